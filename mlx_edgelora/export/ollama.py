"""Write what `ollama create` takes: a GGUF file and a Modelfile with template and stop tokens."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_edgelora.data.conversation import Message
from mlx_edgelora.data.template import Template
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.chat_turns import ChatTurns, find_turns
from mlx_edgelora.export.folders import new_folder
from mlx_edgelora.export.gguf_files import ADAPTER_FILE, MODEL_FILE, write_adapter, write_model
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.storage.files import write_atomically

MODELFILE = "Modelfile"
# Settings of generation_config.json that Ollama has under the same name.
_SAMPLING = "temperature", "top_k", "top_p", "min_p"


def export_ollama(
    adapter: str | os.PathLike,
    save_path: str | os.PathLike,
    model: str | None = None,
    base_model: str | None = None,
    outtype: str | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write a folder that `ollama create NAME -f Modelfile` makes a model of.

    Args:
        adapter: folder of an adapter in mlx-lm's format.
        save_path: a folder that does not exist yet.
        model: the base model, a folder or a Hub name; None for the one that the adapter names.
        base_model: Ollama's name of the base model, such as `llama3.2:3b`: the folder then has
            the adapter only. None for the whole model, with the adapter merged into it.
        outtype: as in `export_gguf`.
        notify: called with notes.

    Returns:
        The Modelfile.

    Raises:
        EdgeLoraError: as `export_gguf`, or Ollama cannot have the model's chat template;
            `save_path` is not created.
    """
    with new_folder(save_path) as folder:
        if base_model is None:
            file = folder / MODEL_FILE
            lazy = write_model(file, adapter, model, outtype or "f16", notify)
        else:
            file = folder / ADAPTER_FILE
            lazy = write_adapter(file, adapter, model, outtype or "f16", notify)
        text = modelfile(lazy, base_model, notify)
        write_atomically({folder / MODELFILE: lambda file: file.write(text.encode())})
    return Path(save_path) / MODELFILE


def modelfile(lazy: LazyModel, base_model: str | None, notify: Callable[[str], None]) -> str:
    """The text of a Modelfile for a model.

    Args:
        lazy: the model, for its tokenizer.
        base_model: Ollama's name of the base model; None if `model.gguf` has all weights.
        notify: called with notes.

    Raises:
        EdgeLoraError: Ollama cannot have the chat template.
    """
    lines = [f"FROM ./{MODEL_FILE}"]
    if base_model is not None:
        if not base_model.strip() or len(base_model.split()) != 1:
            raise EdgeLoraError(
                f"--base-model: got {base_model!r}, expected a name of Ollama such as llama3.2:3b"
            )
        lines = [f"FROM {base_model}", f"ADAPTER ./{ADAPTER_FILE}"]
    tokenizer = load_tokenizer_of(lazy)
    stops = set(tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)))
    template = "{{ .Prompt }}"
    if tokenizer.has_chat_template:
        turns = find_turns(_renderer(tokenizer), str(lazy.source))
        if turns.system is None:
            notify("note: the chat template has no turn for system messages; they are left out")
        template = go_template(turns)
    else:
        notify("note: the model has no chat template; prompts are given to it as they are")
    if '"""' in template:
        raise EdgeLoraError(f'{lazy.source}: the chat template contains """, which ends a template')
    lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in sorted(stops)]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(lazy.source).items()]
    return "\n".join(lines) + "\n"


def go_template(turns: ChatTurns) -> str:
    """Ollama's template that writes the same texts around turns, in the language of Go."""
    roles = {"system": turns.system, "user": turns.user, "assistant": turns.assistant}
    branches = [
        f'{{{{ if eq .Role "{role}" }}}}{_quote(around[0])}{{{{ .Content }}}}{_quote(around[1])}'
        for role, around in roles.items()
        if around is not None
    ]
    default = f"{{{{ if not .System }}}}{_quote(turns.default)}{{{{ end }}}}"
    body = "{{ else }}".join(branches) + "{{ end }}" * len(branches)
    return (
        f"{default if turns.default else ''}{{{{ range .Messages }}}}{body}{{{{ end }}}}"
        f"{_quote(turns.answer)}"
    )


def _quote(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _renderer(tokenizer: TokenizerWrapper) -> Callable[[Sequence[Message], bool], str]:
    """The tokenizer's template as text, without the token that begins a sequence."""
    template = Template(tokenizer)
    # llama.cpp adds the token itself, if the tokenizer does.
    adds = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    start = tokenizer.bos_token if adds else ""

    def render(messages: Sequence[Message], answers: bool) -> str:
        return template.text(messages, None, answers).removeprefix(start)

    return render


def _sampling(folder: Path) -> dict[str, float]:
    """The sampling options that the model's authors chose."""
    try:
        settings = json.loads((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(settings, dict):
        return {}
    values = {name: settings.get(name) for name in _SAMPLING}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
