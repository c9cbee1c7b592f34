"""`python -m mlx_edgelora.evaluate`: compare a model with and without its adapter."""

import argparse
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import BUDGET, add_model, path_argument, read_value
from mlx_edgelora.evaluation.evaluating import Evaluation, evaluate
from mlx_edgelora.measure.text import COLUMNS, named_rows
from mlx_edgelora.measure.units import size

# Answers that are printed, and characters of each.
SHOWN, CHARACTERS = 3, 3 * COLUMNS


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    options = _parser().parse_args(argv)
    budget = options.memory_budget
    if budget is not None:
        budget = read_value("--memory-budget", budget, BUDGET)
    found = evaluate(
        options.adapter_path,
        options.model,
        options.data,
        options.num_samples,
        options.max_tokens,
        options.batch_size,
        budget,
        options.save_path,
    )
    _show(found)
    if options.save_path is not None:
        print(f"\nThe answers are in {options.save_path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora evaluate",
        usage="%(prog)s [options]",
        description="Compare a model with and without its adapter: loss and perplexity on the test "
        "set, and answers to some of its rows. Weights that do not fit into the memory budget are "
        "read from disk block by block. Without options the adapter in the folder adapters is "
        "evaluated.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model(parser)
    add(
        "--adapter-path",
        type=path_argument,
        default="adapters",
        metavar="FOLDER",
        help="Folder of the adapter. Default: adapters.",
    )
    add(
        "--data",
        type=path_argument,
        metavar="DATA",
        help="Folder with a test set, or a file of test rows. Default: the data of the run that "
        "made the adapter.",
    )
    add(
        "--num-samples",
        type=int,
        default=20,
        metavar="N",
        help="Number of rows whose prompts are answered, the first ones of the test set; 0 for "
        "none. Default: 20.",
    )
    add(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="Tokens of an answer, at most. Default: 256.",
    )
    add(
        "--batch-size",
        type=int,
        default=4,
        metavar="N",
        help="Rows that are computed at once. Default: 4.",
    )
    add(
        "--memory-budget",
        metavar="SIZE",
        help="Memory limit for MLX, such as 2GB; min for the "
        "least. Default: what is free, less 20 %%.",
    )
    add(
        "--save-path",
        type=path_argument,
        metavar="FILE",
        help="JSONL file for the answers. Default: none.",
    )
    return parser


def _show(found: Evaluation) -> None:
    for row in found.rows[:SHOWN]:
        texts = {name: row[name] for name in ("prompt", "expected")}
        texts |= {side: row[side]["answer"] for side in ("base", "adapter")}
        print("\n" + "\n".join(named_rows({n: _short(t) for n, t in texts.items()}, 10)))
    print(f"\n{found.table()}\n")
    line = f"{found.tokens:,} tokens"
    if found.rows:
        line += f", {len(found.rows):,} answers"
    print(f"{line}; peak memory {size(found.peak_memory_bytes)}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 2]} …"


if __name__ == "__main__":
    sys.exit(main())
