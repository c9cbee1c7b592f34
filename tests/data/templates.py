"""Chat templates in the forms of well-known models, on a small byte-level tokenizer.

Each comes with what a model of that form generates for an answer, written down apart from it.
"""

import json
from dataclasses import dataclass, field
from functools import cache

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|User|>",
    "<|Assistant|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
)

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

GEMMA = """{{ bos_token }}{% set ns = namespace(first='') %}
{%- if messages[0].role == 'system' %}{% set ns.first = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- ns.first if loop.first else '' }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# The system message and the tools are written before the last message of the user alone, the
# system message only if nothing follows.
MISTRAL = """{{ bos_token }}{% set ns = namespace(last=-1, system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}
{%- elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if loop.last and ns.system %}{{ '[INST] ' + ns.system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}
{{- '{"name": ' + (c.function.name | tojson) + ', "arguments": ' }}
{{- (c.function.arguments | tojson) + '}' }}{% if not loop.last %}{{ ', ' }}{% endif %}
{%- endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + '}[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}"""

# Cuts the reasoning out of every answer, and asks for it when it is to be generated.
R1 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}
{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# Reasoning is written behind the last question only.
QWEN3 = """{% if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '# Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(query=messages | length - 1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}{% set content = m.content or '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set reasoning = m.reasoning_content or '' %}
{%- if not reasoning and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}
{%- for c in m.tool_calls or [] %}{% if loop.index0 or content %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Channels; reasoning of earlier answers is left out, and they end otherwise than the last one.
HARMONY = """{{ '<|start|>system<|message|>You are a model.<|end|>' }}
{%- if messages[0].role in ['system', 'developer'] or tools %}
{{- '<|start|>developer<|message|># Instructions\n\n' }}
{%- if messages[0].role in ['system', 'developer'] %}{{ messages[0].content }}{% endif %}
{%- if tools %}{{ '\n\n# Tools\n\nnamespace functions {\n' }}{% for tool in tools %}
{{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: ' }}
{{- tool.function.parameters | tojson + ') => any;\n' }}{% endfor %}{{ '}' }}{% endif %}
{{- '<|end|>' }}{% endif %}
{%- set ns = namespace(tool='') %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- set c = m.tool_calls[0].function %}{% set ns.tool = c.name %}
{%- if m.thinking and not (messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'assistant')
    | rejectattr('tool_calls', 'defined') | list) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary json<|message|>' }}
{{- c.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
{%- if m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + ns.tool + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson + '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


def plain(end):
    """What is generated where only the content is written."""
    return lambda message, **_: message["content"].strip() + end


def mistral(message, **_):
    """What Mistral generates."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    if not calls:
        return " " + message["content"] + "<eos>"
    shown = [f'{{"name": {_json(c["name"])}, "arguments": {_json(c["arguments"])}}}' for c in calls]
    return f"[TOOL_CALLS] [{', '.join(shown)}]<eos>"


def r1(message, **_):
    """What R1's template leaves of an answer."""
    return message["content"].split("</think>")[-1] + "<eos>"


def qwen3(message, is_last, **_):
    """What Qwen 3 generates; empty reasoning is written in the last answer of a row alone."""
    content, reasoning = message["content"], message.get("reasoning_content", "")
    if not reasoning and "</think>" in content:
        head, _, content = content.rpartition("</think>")
        reasoning, content = head.split("<think>")[-1].strip("\n"), content.lstrip("\n")
    text = f"<think>\n{reasoning}\n</think>\n\n" if reasoning or is_last else ""
    text += content
    for call in message.get("tool_calls", []):
        function = call["function"]
        text += "\n" if text and not text.endswith("</think>\n\n") else ""
        text += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": '
        text += _json(function["arguments"]) + "}\n</tool_call>"
    return text + "<|im_end|>\n"


def harmony(message, **_):
    """What gpt-oss generates."""
    text, calls = "", message.get("tool_calls", [])
    if message.get("thinking"):
        text = f"<|channel|>analysis<|message|>{message['thinking']}<|end|><|start|>assistant"
    if not calls:
        return text + f"<|channel|>final<|message|>{message['content']}<|return|>"
    function = calls[0]["function"]
    name, arguments = function["name"], _json(function["arguments"])
    return text + (f" to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>")


def _json(value):
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Form:
    """A template, its tokens, what it generates, and what it does not write at all."""

    template: str
    generated: object
    end: str = "<|im_end|>"
    stops: tuple = ()
    begin: str | None = None
    loses: frozenset = field(default_factory=frozenset)

    @property
    def tokenizer(self):
        return made_tokenizer(self.template, self.end, self.stops, self.begin)


ALL = frozenset({"reasoning", "tool calls", "tools"})
FORMS = {
    "ChatML": Form(CHATML, plain("<|im_end|>\n"), loses=ALL),
    "ChatML, marked": Form(MARKED, plain("<|im_end|>"), loses=ALL),
    "Llama 3": Form(LLAMA3, plain("<|eot_id|>"), "<|eot_id|>", begin="<bos>", loses=ALL),
    "Gemma": Form(GEMMA, plain("<end_of_turn>\n"), "<eos>", ("<end_of_turn>",), "<bos>", loses=ALL),
    "Mistral": Form(MISTRAL, mistral, "<eos>", begin="<bos>", loses=frozenset({"reasoning"})),
    "DeepSeek-R1": Form(R1, r1, "<eos>", begin="<bos>", loses=ALL),
    "Qwen 3": Form(QWEN3, qwen3),
    "gpt-oss": Form(HARMONY, harmony, "<|return|>", ("<|call|>",)),
}


@cache
def made_tokenizer(template, end="<|im_end|>", stops=(), begin=None, unknown=None):
    """Bytes and special tokens; adds `begin` to plain text as Llama's do."""
    ids = {token: i for i, token in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        ids[byte] = len(ids)
    merges = [("a", "n"), ("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "a")]
    for left, right in merges:
        ids[left + right] = len(ids)
    inner = Tokenizer(models.BPE(ids, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if begin:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
        )
    names = {"bos_token": begin} if begin else {}
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token="<pad>", unk_token=unknown, **names
    )
    outer.chat_template = template
    return TokenizerWrapper(outer, eos_token_ids=[ids[token] for token in stops])
