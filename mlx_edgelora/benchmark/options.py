"""The options of the benchmark: flags, defaults and checks."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from mlx_edgelora.benchmark.contenders import BUDGETS, own
from mlx_edgelora.benchmark.machine import on_cpu
from mlx_edgelora.benchmark.published import CONTEXTS
from mlx_edgelora.benchmark.shapes import SHAPES, WEIGHTS, default_cache
from mlx_edgelora.config.kinds import path_argument
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import make_folder

CONTEXT, BATCH, LABELLED = 512, 1, 0.3
# Defaults without a model and a shape; they take two minutes on two CPU cores with a fast BLAS.
DEMO_SHAPE, DEMO_BLOCKS, DEMO_BUDGETS = "smollm2-135m", 6, ("none", "25%", "min")
LEAST_STEPS = 5


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise an error of one sentence, as for all other errors."""
        raise EdgeLoraError(f"command line: {message}; --help lists what there is")


def options_from_cli(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options on a command line and fill in the defaults.

    Raises:
        EdgeLoraError: an unknown flag, an invalid value, or two options that exclude each other.
    """
    options = _parser().parse_args(argv)
    _check_together(options)
    options.is_demo = options.model is None and options.shape is None
    if options.is_demo:
        options.shape, options.blocks = DEMO_SHAPE, DEMO_BLOCKS
    options.budgets = options.budgets or (DEMO_BUDGETS if options.is_demo else BUDGETS)
    options.may_shorten = options.is_demo and options.contexts is None
    options.contexts = options.contexts or [CONTEXT]
    options.batch = options.batch or BATCH
    if options.labelled is None and options.data is None:
        options.labelled = LABELLED
    if options.shape is not None:
        options.blocks = options.blocks or SHAPES[options.shape][1]
        options.weights = options.weights or ("float32" if on_cpu() else "4bit")
    options.cache = options.cache.absolute()
    make_folder(options.cache)
    if options.output is not None:
        make_folder(options.output)
    return options


def _parser() -> _Parser:
    parser = _Parser(
        prog="mlx-edgelora benchmark",
        usage="%(prog)s [options]",
        description="Compare memory and time of a training step with mlx-lm's on one model, and "
        "check that both compute the same. Without --model and --shape it takes a small random "
        "model and about two minutes.",
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL", help="A local folder or a Hugging Face name of a model."
    )
    model.add_argument(
        "--shape",
        choices=SHAPES,
        metavar="SHAPE",
        help=f"A random model of this shape instead: {', '.join(SHAPES)}.",
    )
    model.add_argument(
        "--blocks", type=_count, metavar="N", help="Blocks of that shape. Default: all."
    )
    model.add_argument(
        "--weights",
        choices=WEIGHTS,
        metavar="|".join(WEIGHTS),
        help="Weights of that shape. Default: float32 on a CPU, where mlx-lm's quantized products "
        "are much slower than any others, and 4bit elsewhere.",
    )
    work = parser.add_argument_group("training step")
    work.add_argument(
        "--contexts",
        type=_count,
        nargs="+",
        metavar="TOKENS",
        help=f"Tokens of a row; several are measured in turn. Default: {CONTEXT}.",
    )
    work.add_argument(
        "--batch",
        type=_count,
        metavar="N",
        help=f"Rows of a batch. Default: {BATCH}.",
    )
    work.add_argument(
        "--data",
        type=lambda text: Path(path_argument(text)),
        metavar="FOLDER",
        help="Folder with train.jsonl, whose prompts are masked. Default: random words.",
    )
    work.add_argument(
        "--labelled",
        type=_share,
        metavar="SHARE",
        help=f"Fraction of the tokens of random rows that have a label. Default: {LABELLED}.",
    )
    work.add_argument(
        "--rank", type=_count, default=8, metavar="N", help="Rank of the adapters. Default: 8."
    )
    work.add_argument(
        "--learning-rate",
        type=float,
        default=1e-4,
        metavar="RATE",
        help="Learning rate of AdamW. Default: 0.0001.",
    )
    how = parser.add_argument_group("comparison")
    how.add_argument(
        "--budgets",
        type=_budget,
        nargs="+",
        metavar="BUDGET",
        help="Memory budgets of this package, a row for each: none, min, 4GB, or 25% of the peak "
        f"of mlx-lm with checkpointing. Default: {' '.join(BUDGETS)}; without --model and --shape "
        f"{' '.join(DEMO_BUDGETS)}.".replace("%", "%%"),
    )
    how.add_argument(
        "--steps",
        type=_count,
        default=LEAST_STEPS,
        metavar="N",
        help=f"Timed steps of each contender. Default: {LEAST_STEPS}.",
    )
    how.add_argument(
        "--kernel",
        choices=("same", "auto"),
        default="same",
        metavar="same|auto",
        help="How this package multiplies quantized weights: as mlx-lm does (same), or as its plan "
        "says (auto). Default: same.",
    )
    how.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="One more contender; mlx_edgelora/benchmark/contenders.py describes the function.",
    )
    how.add_argument(
        "--ladder",
        action="store_true",
        help="Add the techniques of the published table one at a time instead.",
    )
    how.add_argument(
        "--row-seconds",
        type=float,
        default=120,
        metavar="SECONDS",
        help="Rows of --ladder that are expected to take longer are estimated, not measured. "
        "Default: 120.",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=lambda text: Path(path_argument(text)),
        metavar="FOLDER",
        help="Folder for tables and pictures.",
    )
    output.add_argument(
        "--cache",
        type=lambda text: Path(path_argument(text)),
        default=default_cache(),
        metavar="FOLDER",
        help="Folder for random models and scratch files. Default: the user's cache.",
    )
    return parser


def _check_together(options: argparse.Namespace) -> None:
    if options.model is not None and options.shape is not None:
        raise EdgeLoraError("--shape: got it beside --model, expected one of them; leave one out")
    for name in ("blocks", "weights"):
        if getattr(options, name) is not None and options.shape is None:
            raise EdgeLoraError(f"--{name}: got it without --shape, expected one; name a shape")
    if options.shape is not None and (options.blocks or 0) > SHAPES[options.shape][1]:
        raise EdgeLoraError(
            f"--blocks: got {options.blocks}, expected at most {SHAPES[options.shape][1]}, which "
            f"{options.shape} has; lower it"
        )
    if options.labelled is not None and options.data is not None:
        raise EdgeLoraError(
            "--labelled: got it where rows are given, expected none: their prompts are masked; "
            "leave one of the two out"
        )
    if options.steps < LEAST_STEPS:
        raise EdgeLoraError(
            f"--steps: got {options.steps}, expected at least {LEAST_STEPS}: fewer have no spread"
        )
    for also in options.also:
        if find_spec_of(also) is None:
            raise EdgeLoraError(
                f"--also: got {also!r}, expected module:function of a module that can be imported; "
                "set PYTHONPATH"
            )
    if options.ladder:
        _check_ladder(options)


def _check_ladder(options: argparse.Namespace) -> None:
    if options.shape is None:
        raise EdgeLoraError("--ladder: got it without --shape, expected one; name a shape")
    for name in ("weights", "labelled", "data", "batch", "budgets"):
        if getattr(options, name) is not None:
            raise EdgeLoraError(
                f"--{name}: got it with --ladder, whose rows have their own; leave it out"
            )
    options.contexts = options.contexts or list(CONTEXTS)


def find_spec_of(runner: str) -> object | None:
    """The spec of the module in `module:function`, without importing it; None if not found."""
    module, _, function = runner.partition(":")
    try:
        return find_spec(module) if module and function else None
    except (ImportError, ValueError):
        return None


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0 and at most 1")
    return value


def _budget(text: str) -> str:
    try:
        own(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text}, expected none, min, 25% of mlx-lm's peak, or memory such as 800MB or 4GB"
        ) from None
    return text


_count.__name__, _share.__name__ = "whole number", "number"
