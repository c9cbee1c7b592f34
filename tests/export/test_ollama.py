"""Modelfiles: their template writes what the model's own chat template writes."""

import json
import re

import pytest
from bytes_tokenizer import write_tokenizer
from test_gguf import make, read  # noqa: F401 - a fixture

from mlx_edgelora.export.__main__ import main
from mlx_edgelora.export.ollama import export_ollama

pytest.importorskip("gguf")

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Writes the last question differently from others.
ODD = "{% for m in messages %}{{ loop.revindex }}: {{ m.content }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL}


def ask(*contents, system=None):
    roles = "user", "assistant"
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def run_go(template, messages):
    """What Ollama makes of a template, for the few actions that are used."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    pieces = re.split(r"\{\{(.*?)\}\}", template)
    code, depth = ["def run(messages, System):", " out = []", " m = {}"], 1
    for number, piece in enumerate(pieces):
        action, pad = piece.strip(), " " * depth
        if number % 2 == 0:
            code.append(f"{pad}out.append({piece!r})")
        elif action == "end":
            depth -= 1
            code.append(f"{' ' * depth}pass")
        elif action == "else":
            code += [f"{' ' * (depth - 1)}else:", f"{pad}pass"]
        elif action == "range .Messages":
            code.append(f"{pad}for m in messages:")
            depth += 1
        elif action == "if not .System":
            code.append(f"{pad}if not System:")
            depth += 1
        elif match := re.fullmatch(r'if eq \.Role "(\w+)"', action):
            code.append(f"{pad}if m['role'] == {match[1]!r}:")
            depth += 1
        else:
            value = {".Content": "m['content']", ".Prompt": "messages[-1]['content']"}
            code.append(f"{pad}out.append({value.get(action, action)})")
    scope = {}
    exec("\n".join([*code, " return ''.join(out)"]), scope)
    return scope["run"](messages, system)


def parse(text):
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)[1]
    stops = [json.loads(stop) for stop in re.findall(r"^PARAMETER stop (.*)$", text, re.MULTILINE)]
    return template, stops


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_writes_what_the_models_own_does(make, tmp_path, name):  # noqa: F811
    from transformers import AutoTokenizer

    model, adapter = make("llama")
    write_tokenizer(model, template=TEMPLATES[name])
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_p": "x"}')
    notes = []
    file = export_ollama(adapter, tmp_path / "out", notify=notes.append)
    text = file.read_text()
    template, stops = parse(text)
    own = AutoTokenizer.from_pretrained(model)
    conversations = [ask("Hi"), ask("a", "b", "c"), ask("a {{ b", "c", "d", "e", "f")]
    if name == "chatml":
        conversations += [ask("Hi", system="Be brief."), ask("a", "b", "c", system="s")]
    assert any("system messages" in note for note in notes) == (name != "chatml")
    for messages in conversations:
        expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run_go(template, messages) == expected
    assert stops == ["<|im_end|>"]
    assert text.startswith("FROM ./model.gguf\n") and "PARAMETER temperature 0.6\n" in text
    assert "top_p" not in text
    assert read(file.parent / "model.gguf")[1]["tokenizer.chat_template"] == TEMPLATES[name]


def test_an_adapter_for_a_model_that_ollama_has(make, tmp_path, capsys):  # noqa: F811
    model, adapter = make("llama")
    write_tokenizer(model, template=CHATML)
    target = tmp_path / "out"
    command = ["ollama", "--adapter-path", str(adapter), "--save-path", str(target)]
    assert main([*command, "--base-model", "llama3.2:3b"]) == 0
    assert f"ollama create my-model -f {target}/Modelfile" in capsys.readouterr().out
    text = (target / "Modelfile").read_text()
    assert text.startswith("FROM llama3.2:3b\nADAPTER ./adapter.gguf\nTEMPLATE")
    assert sorted(path.name for path in target.iterdir()) == ["Modelfile", "adapter.gguf"]


def test_a_model_without_a_chat_template(make, tmp_path):  # noqa: F811
    _, adapter = make("llama")
    notes = []
    file = export_ollama(adapter, tmp_path / "out", notify=notes.append)
    assert parse(file.read_text())[0] == "{{ .Prompt }}"
    assert any("has no chat template" in note for note in notes)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (ODD, [], "does not write fixed texts around its turns"),
        ("{{ messages[0].content }}", [], "does not write fixed texts around its turns"),
        (CHATML.replace("kind", '"""'), [], 'contains """'),
        (CHATML, ["--base-model", "a\nb"], "expected a name of Ollama"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(
    make,  # noqa: F811
    tmp_path,
    capsys,
    template,
    options,
    message,
):
    model, adapter = make("llama")
    write_tokenizer(model, template=template)
    before = sorted(tmp_path.iterdir())
    command = ["ollama", "--adapter-path", str(adapter), "--save-path", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
