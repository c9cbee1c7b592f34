"""The console command `mlx-edgelora`, also available as `python -m mlx_edgelora`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": ("train", "Fine-tune a model."),
    "data": ("preview.command", "Show the data as a run will see it, with the labels."),
    "plan": ("plan", "Tell whether a run fits into memory, and how it would be computed."),
    "generate": ("generate", "Answer prompts with a model and its adapter."),
    "evaluate": ("evaluate", "Compare a model with and without its adapter on a test set."),
    "fuse": ("fuse", "Merge an adapter into its model."),
    "export": ("export.__main__", "Write an adapter in the format of another program."),
    "import": ("import", "Turn an adapter of Hugging Face PEFT into one of mlx-lm."),
    "verify": ("verify", "Compare the gradients of a run with those of plain MLX."),
    "benchmark": ("benchmark.__main__", "Compare memory and time with mlx-lm."),
    "doctor": ("doctor", "Measure what this machine can do, and write a report of it."),
    "report": ("report.__main__", "Make a page about a run from its log."),
}
USAGE = """usage: mlx-edgelora COMMAND [options]

LoRA fine-tuning of language models on MLX within a memory budget.

commands:
{commands}

Each command runs without options and shows what it is for;
mlx-edgelora COMMAND --help lists its options.
`python -m mlx_edgelora.COMMAND` is the same."""


def usage() -> str:
    """The help text, with a line for each command."""
    lines = [f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, or 2 if the command is unknown."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"mlx-edgelora {version('mlx-edgelora')}")
        return 0
    if argv[0] not in COMMANDS:
        print(
            f"error: got {argv[0]!r}, expected one of the commands {', '.join(COMMANDS)}; "
            "mlx-edgelora --help describes them",
            file=sys.stderr,
        )
        return 2
    module, _ = COMMANDS[argv[0]]
    try:
        run = import_module(f"mlx_edgelora.{module}").main
    except KeyboardInterrupt:  # imports take long enough to be interrupted
        return 130
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
