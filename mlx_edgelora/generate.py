"""`python -m mlx_edgelora.generate`: answer prompts with an adapter, within a memory budget."""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import BUDGET, MOST_COUNT, add_model, path_argument, read_value
from mlx_edgelora.embedded import MODEL_PATH, held_out_rows
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.inference.generating import Generator, Sampling, open_generator
from mlx_edgelora.inference.prompts import conversation, read_prompts
from mlx_edgelora.measure.meter import peak_memory
from mlx_edgelora.measure.text import wrapped
from mlx_edgelora.measure.units import duration, size
from mlx_edgelora.model.lora import can_switch_off
from mlx_edgelora.training.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_adapter,
    model_for,
    read_adapter_config,
)
from mlx_edgelora.training.failures import explain_failures

# Tokens of a conversation before its answer, for the memory plan of a chat.
CHAT_TOKENS = 2048


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    options = _parser().parse_args(argv)
    adapter = _adapter(options.adapter_path)
    if adapter is None:
        model = options.model or str(MODEL_PATH)
    else:
        model = model_for(adapter, options.model, _note)
    prompts = list(_prompts(options, adapter))
    rows = max(1, min(options.batch_size, len(prompts)))
    budget = options.memory_budget
    if budget is not None:
        budget = read_value("--memory-budget", budget, BUDGET)
    sampling = Sampling(
        options.max_tokens,
        options.temp,
        options.top_p,
        options.min_p,
        options.top_k,
        options.seed,
    )
    tokens = sampling.max_tokens + (CHAT_TOKENS if options.chat else 0)
    how = budget, rows, tokens, _note, prompts
    base = _base_answers(model, adapter, how, sampling) if options.compare else None
    with (
        open_generator(model, adapter, *how) as generator,
        explain_failures("nothing was written"),
    ):
        if (seconds := generator.seconds_per_token()) is not None:
            together = f" for {rows} prompts together" if rows > 1 else ""
            _note(
                f"a token takes about {duration(seconds)}{together}, an answer of "
                f"{sampling.max_tokens} tokens {duration(seconds * sampling.max_tokens)}"
            )
        if options.chat:
            _chat(generator, options.system_prompt, sampling)
            return 0
        _answer(generator, prompts, options, sampling, base)
    _note(f"peak memory {size(peak_memory())}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora generate",
        usage="%(prog)s [options]",
        description="Answer prompts with a model and its adapter. A model that does not fit into "
        "the memory budget is read from disk block by block for each token, once for all prompts. "
        "Without options the tiny model that comes with the package answers.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model(parser)
    add(
        "--adapter-path",
        type=path_argument,
        metavar="FOLDER",
        help="Folder of an adapter. Default: none, the base model answers.",
    )
    add("--compare", action="store_true", help="Answer without and with the adapter.")
    add("--prompt", "-p", metavar="TEXT", help="Prompt; - reads it from standard input.")
    add(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="File of prompts: a text in each line, or JSON objects with prompt or messages.",
    )
    add("--chat", action="store_true", help="Talk with the model in the terminal.")
    add("--system-prompt", metavar="TEXT", help="System prompt. Default: none.")
    add("--ignore-chat-template", action="store_true", help="Take prompts as plain text.")
    add(
        "--max-tokens",
        "-m",
        type=int,
        default=256,
        metavar="N",
        help="Tokens of an answer, at most. Default: 256.",
    )
    add("--temp", type=float, default=0.0, metavar="T", help="Temperature. Default: 0.0.")
    add("--top-p", type=float, default=1.0, metavar="P", help="Top-p. Default: 1.0.")
    add("--min-p", type=float, default=0.0, metavar="P", help="Min-p. Default: 0.0.")
    add("--top-k", type=int, default=0, metavar="K", help="Top-k; 0 for none. Default: 0.")
    add("--seed", type=int, metavar="N", help="Random seed. Default: none.")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="Prompts of a file that are answered at once. Default: 8.",
    )
    add(
        "--memory-budget",
        metavar="SIZE",
        help="Memory limit for MLX, such as 2GB; min for the "
        "least. Default: what is free, less 20 %%.",
    )
    return parser


def _note(line: str) -> None:
    """Print a line to standard error, apart from the answers."""
    print(wrapped(line), file=sys.stderr, flush=True)


def _adapter(folder: str | None) -> Path | None:
    if folder is None:
        return None
    path = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise EdgeLoraError(f"--adapter-path: {path} has no {name}, expected an adapter in it")
    if note := check_adapter(path / WEIGHTS_FILE):
        _note(f"note: {note}")
    return path


def _prompts(options: argparse.Namespace, adapter: Path | None) -> Iterator[list | str]:
    """The prompts to answer: conversations, or plain text with --ignore-chat-template."""
    if options.compare and adapter is None:
        raise EdgeLoraError("--compare: got no --adapter-path, expected the adapter to compare")
    if options.max_tokens < 1 or options.batch_size < 1:
        raise EdgeLoraError("--max-tokens, --batch-size: expected whole numbers of at least 1")
    _check_sampling(options)
    given = [name for name in ("prompt", "prompts", "chat") if getattr(options, name)]
    if len(given) > 1:
        raise EdgeLoraError(f"--{given[0]}, --{given[1]}: got both, expected one of them")
    if options.chat:
        return
    if options.prompts is not None:
        for place, row in read_prompts(Path(options.prompts), "--prompts"):
            yield _conversation(row, place, options)
        return
    text = options.prompt
    if text is None:
        text = held_out_rows(1)[0]["prompt"]
        _note(f"prompt: {text}")
    yield _conversation(sys.stdin.read() if text == "-" else text, "--prompt", options)


def _check_sampling(options: argparse.Namespace) -> None:
    limits = {"temp": 1e6, "top_p": 1, "min_p": 1, "top_k": MOST_COUNT, "seed": 2**64 - 1}
    limits |= {"max_tokens": MOST_COUNT, "batch_size": MOST_COUNT}
    for name, most in limits.items():
        value = getattr(options, name)
        if value is not None and not 0 <= value <= most:
            flag = name.replace("_", "-")
            raise EdgeLoraError(f"--{flag}: got {value}, expected at least 0 and at most {most}")


def _conversation(row: object, place: str, options: argparse.Namespace) -> list | str:
    messages = conversation(row, place, options.system_prompt)
    is_text = isinstance(row, str) or "messages" not in row
    return messages[-1]["content"] if options.ignore_chat_template and is_text else messages


def _base_answers(
    model: str, adapter: Path, how: tuple, sampling: Sampling
) -> Sequence[str] | None:
    """The answers of the base model, where an adapter cannot be switched off; else None."""
    kind = read_adapter_config(adapter).get("fine_tune_type", "lora")
    if can_switch_off(kind):
        return None
    with open_generator(model, None, *how) as generator, explain_failures("nothing was written"):
        encoded = [generator.encode(prompt) for prompt in how[-1]]
        answers = generator.answers(encoded, sampling)
    del generator
    gc.collect()  # two models might not fit
    mx.clear_cache()
    return answers


def _answer(
    generator: Generator,
    prompts: Sequence[list | str],
    options: argparse.Namespace,
    sampling: Sampling,
    base: Sequence[str] | None,
) -> None:
    """Print the answers; `base` are those without the adapter, if they are known."""
    encoded = [generator.encode(prompt) for prompt in prompts]
    if len(encoded) == 1 and not options.compare:
        for text in generator.stream(encoded[0], sampling):
            print(text, end="", flush=True)
        print()
        return
    if options.compare and base is None:
        with generator.without_adapter():
            base = generator.answers(encoded, sampling)
    base = base or [None] * len(encoded)
    answers = generator.answers(encoded, sampling)
    for prompt, before, answer in zip(prompts, base, answers, strict=True):
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        row = {"prompt": asked}
        row |= {"answer": answer} if before is None else {"base": before, "adapter": answer}
        if options.prompts is not None:
            print(json.dumps(row, ensure_ascii=False))
        else:
            print("\n".join(f"{name}: {text}" for name, text in row.items()))


def _chat(generator: Generator, system: str | None, sampling: Sampling) -> None:
    """Answer prompts from the terminal until an empty line or the end of the input."""
    messages = [{"role": "system", "content": system}] if system else []
    _note("An empty line or Ctrl-D ends the chat.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        pieces = []
        for piece in generator.stream(generator.encode(messages), sampling):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


if __name__ == "__main__":
    sys.exit(main())
