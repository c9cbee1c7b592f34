"""The planner beside reality: whether plans keep their promise, what fits, the formula's numbers.

    python benchmarks/planner.py grid
    python benchmarks/planner.py budgets --shape llama-3.2-3b --blocks 8 --tokens 256 --plot p.png
    python benchmarks/planner.py fits
    python benchmarks/planner.py collect phases.jsonl --shape llama-3.2-1b --blocks 4 --rank 4
    python benchmarks/planner.py fit phases.jsonl other.jsonl

`grid` makes one step for each of some 90 combinations of shape, context, batch, rank, dtype and
budget, each planned by the budget alone, as a run is: with what a few blocks take on this machine
(`training/sampling.py`). `formula` is the peak that was expected before anything was measured,
`expected` the planner's after it, `measured` that of `mx.get_peak_memory` over the second step
(MLX's buffer cache off, its memory limit set to the budget), weights, adapters, gradients
and optimizer state included. Rows marked * have products of bfloat16 by a stand-in
(`benchmarks/memory.py`): the same arrays, without meaning. With --stand-in all rows have, which is
several times as fast.

`budgets` times plans between the smallest budget and plenty for one shape, in turn, and prints
how much faster each is than the one before.

`fits` is the README's table, by the formula alone: of each shape a block or a few of random 4-bit
weights are made, and the planner is asked about the model of full depth, one row of 2048 tokens,
half of them labelled, bfloat16, rank 8 on all blocks. Which of two ways is faster follows from the
rates of the machine that this runs on, or from those of `--rates`.

`collect` measures phases of one shape as a run does before its first step, for several batches and
ways to compute them, and appends a line for each to a file. `fit` prints for every kind of phase
the numbers for the terms of `planner/needs.py`, none below 0, with the least relative error, and
how far off these and the present ones are; it needs scipy.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import memory
import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import planner_needs

from mlx_edgelora.benchmark.shapes import SHAPES, checkpoint, default_cache
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import DTYPES, open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import Machine, Rates, this_machine
from mlx_edgelora.planner.measured import Measurements
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.run_plan import Budget, RunPlan
from mlx_edgelora.planner.search import Choice, expected, plan, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape, ModelShape
from mlx_edgelora.training.sampling import first_plan, measure_and_replan

MB = 10**6
# Budgets of the grid, in multiples of the smallest that works; None is plenty.
BUDGETS = (1.03, 1.25, 1.6, 2.5, 4.0, None)
# What `memory.stand_in` replaces.
PRODUCTS = [(mx.array, "__matmul__"), (mx, "addmm"), (mx, "gather_mm"), (mx, "gather_qmm")]
# Of models whose blocks are of several kinds, or have experts.
FEWER_BUDGETS = (1.03, 1.6, 2.5, None)
# Of `fits`: blocks that are made of each shape, budgets in bytes, and the batch.
MADE = {"llama-3.2-1b": 4, "llama-3.2-3b": 3, "llama-3.1-8b": 1, "llama-3.3-70b": 1}
BYTES = (4 * 10**9, 10 * 10**9, 22 * 10**9)


@dataclass(frozen=True)
class Case:
    """One row of the grid; `times` as in `BUDGETS`."""

    shape: str
    blocks: int
    tokens: int
    rows: int
    rank: int
    dtype: str
    labelled: float
    times: float | None

    @property
    def stands_in(self) -> bool:
        """Whether products are not those of the dtype, which a CPU is slow at."""
        return self.dtype == "bfloat16" and self.rows * self.tokens > 128


def grid() -> Iterator[Case]:
    """86 cases; each value of each axis meets many of the others."""
    small, middle, large = ("qwen2.5-0.5b", 6), ("llama-3.2-1b", 4), ("llama-3.2-3b", 4)
    settings = [
        (small, 128, 1, 8, "float32", 1.0),
        (small, 512, 2, 16, "float32", 0.3),
        (small, 1024, 1, 64, "float32", 0.3),
        (small, 4096, 1, 8, "float32", 0.1),
        (small, 128, 1, 16, "bfloat16", 0.3),
        (small, 512, 4, 4, "bfloat16", 0.3),
        (middle, 256, 1, 8, "float32", 0.3),
        (middle, 128, 4, 16, "float32", 0.5),
        (middle, 1024, 1, 4, "bfloat16", 0.2),
        (large, 128, 2, 16, "float32", 0.3),
        (large, 512, 1, 32, "float32", 0.3),
    ]
    for (shape, blocks), tokens, rows, rank, dtype, labelled in settings:
        for times in BUDGETS:
            yield Case(shape, blocks, tokens, rows, rank, dtype, labelled, times)
    kinds = {
        "qwen3-moe-small": 4,
        "qwen3.5-small": 4,
        "granite-4.0-h-small": 6,
        "deepseek-small": 4,
        "gemma-4-small": 6,
    }
    for shape, blocks in kinds.items():
        for times in FEWER_BUDGETS:
            yield Case(shape, blocks, 1024, 1, 8, "float32", 0.3, times)


class Planned:
    """A model of some shape and a batch, to be computed by plans."""

    def __init__(self, args: argparse.Namespace, case: Case) -> None:
        self._folder = checkpoint(args.cache, case.shape, case.blocks)
        self._case, self._cache = case, args.cache
        self._stands_in = case.stands_in or args.stand_in
        lazy = self.lazy()
        dtype = DTYPES[case.dtype]
        self.shape: ModelShape = shape_of(checked_blocks(lazy.model), lazy.vocabulary, dtype)
        self.batch = batch_of(case, lazy.vocabulary)
        self.batch_shape = BatchShape(case.rows, case.tokens, int(self.batch.mask.sum()))
        self.machine: Machine = this_machine(args.cache, args.cache, dtype)
        self._arguments = self.shape, self.batch_shape, self.machine
        self.known, self._smallest = Measurements(overlaps=mx.default_device() == mx.gpu), None

    @contextmanager
    def settled(self, times: float | None) -> Iterator[tuple[RunPlan, int, Engine]]:
        """The run within a budget, what was expected by the formula, and its engine."""
        budget = 10**12 if times is None else round(times * self._least())
        with self._by(Budget(budget, "as asked")) as settled:
            yield settled

    def _least(self) -> int:
        """The smallest budget that works, by what is known once the plan for it was measured."""
        if self._smallest is None:
            with self._by(Budget(None, "the least")) as (chosen, _, _):
                self._smallest = chosen.choice.needs
        return self._smallest

    @contextmanager
    def _by(self, budget: Budget) -> Iterator[tuple[RunPlan, int, Engine]]:
        chosen: RunPlan | None = first_plan(self._run(budget))
        while chosen is not None:
            first = expected(*self._arguments, chosen.plan).peak
            with self._assembled(chosen.plan) as engine:
                another = measure_and_replan(engine, chosen, lambda line: None)
                if another is None:
                    yield chosen, first, engine
            del engine
            gc.collect()  # engines hold themselves
            chosen = another

    def _run(self, budget: Budget) -> RunPlan:
        return RunPlan(*self._arguments, budget, None, {}, True, self.known)

    @contextmanager
    def _assembled(self, chosen: Plan) -> Iterator[Engine]:
        products = {name: getattr(box, name) for box, name in PRODUCTS}
        with build_engine(self.lazy(), chosen, Settings(self._cache, self._case.dtype)) as engine:
            if self._stands_in:
                engine.walk._tiling.summary()  # before products mean nothing
                memory.stand_in(DTYPES[self._case.dtype])
            try:
                yield engine
            finally:
                for box, name in PRODUCTS:
                    setattr(box, name, products[name])

    @contextmanager
    def stepping(self, chosen: Plan) -> Iterator[Callable[[], tuple[int, float]]]:
        """A function that makes a step by a plan and gives its peak and seconds."""
        with self._assembled(chosen) as engine:
            yield self.step_of(engine)

    def step_of(self, engine: Engine) -> Callable[[], tuple[int, float]]:
        """A function that makes a step and gives its peak and seconds."""
        optimizer = optimizers.AdamW(1e-4)
        engine.adapters.start(optimizer)

        def step() -> tuple[int, float]:
            gc.collect()
            mx.synchronize()
            mx.reset_peak_memory()
            start = time.perf_counter()
            loss, _ = engine.backward(self.batch, engine.adapters.add)
            engine.adapters.update(optimizer, 1)
            mx.eval(loss)
            return mx.get_peak_memory(), time.perf_counter() - start

        return step

    def second_peak(self, engine: Engine, budget: int) -> int:
        """Peak of the second step, under MLX's limit as in a run."""
        before = mx.set_memory_limit(budget)
        step = self.step_of(engine)
        step()
        peak, _ = step()
        mx.set_memory_limit(before)
        return peak

    def lazy(self) -> LazyModel:
        """The model with adapters, weights not read."""
        lazy = open_model(str(self._folder), streamed=True, quantize=None, cache=self._folder)
        mx.random.seed(1)
        add_lora(lazy.model, -1, rank=self._case.rank)
        return lazy


def batch_of(case: Case, vocabulary: int) -> Batch:
    """Random tokens, the last share of every row labelled."""
    shape = case.rows, case.tokens + 1
    rows = np.random.RandomState(0).randint(0, vocabulary, shape).astype(np.int32)
    first = case.tokens - max(1, round(case.labelled * case.tokens))
    mask = np.zeros((case.rows, case.tokens), bool)
    mask[:, first:] = True
    return Batch(rows, mask, tuple(range(case.rows)))


def grid_of_plans(args: argparse.Namespace) -> None:
    """Print a Markdown row for every case, and how far off the expected peaks were."""
    names = [
        "shape",
        "blocks",
        "batch",
        "rank",
        "dtype",
        "budget",
        "formula",
        "expected",
        "measured",
        "off",
        "plan",
    ]
    misses, formulas, over, known = [], [], 0, None
    wanted = [case for case in grid() if args.shape in (None, case.shape)][args.skip :]
    if not wanted:
        raise SystemExit(f"--shape {args.shape}, --skip {args.skip}: no row of the grid is left")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for case in wanted:
        if known is None or (known[0] != replace(case, times=None)):
            known = replace(case, times=None), Planned(args, case)
        try:
            with known[1].settled(case.times) as (chosen, first, engine):
                budget, choice = chosen.budget.bytes, chosen.choice
                measured = known[1].second_peak(engine, budget)
        except EdgeLoraError as error:  # measured anew, the least may need more than it did
            print(f"{case.shape}, {case.times} times the least: {error}", flush=True)
            continue
        off = choice.peak / measured - 1
        if case.times is not None:  # where there is plenty nothing is measured before
            misses.append(abs(off))
        formulas.append(abs(first / measured - 1))
        over += measured > budget
        name = "plenty" if case.times is None else f"{budget / MB:.0f}"
        kept = choice.plan.kept_blocks
        way = f"{kept} kept" if kept else "whole"
        if choice.plan.tile_tokens is not None:
            way = f"{choice.plan.tile_tokens} tokens"
        print(
            f"| {case.shape} | {case.blocks} | {case.rows} x {case.tokens} | {case.rank} | "
            f"{case.dtype}{'*' * (case.stands_in or args.stand_in)} | {name} | {first / MB:.1f} | "
            f"{choice.peak / MB:.1f} | {measured / MB:.1f} | {off:+.1%} | {way} |",
            flush=True,
        )
    print(f"\n{len(formulas)} steps, {over} over the budget")
    for name, some in (("measured with a few blocks", misses), ("by the formula", formulas)):
        if not some:
            continue
        ordered = np.sort(some)
        print(
            f"{name}: off by {ordered.mean():.1%} on average, within 5 % in "
            f"{np.mean(ordered <= 0.05):.0%}, within 10 % in {np.mean(ordered <= 0.1):.0%}, "
            f"{ordered[-1]:.1%} at most"
        )


def budgets(args: argparse.Namespace) -> None:
    """Time distinct plans in turn."""
    case = Case(args.shape, args.blocks, args.tokens, 1, 16, "float32", args.labelled, None)
    planned = Planned(args, case)
    arguments = planned.shape, planned.batch_shape, planned.machine
    low = smallest(*arguments).needs
    plenty = plan(*arguments, 10**12).needs
    choices: list[Choice] = []
    for budget in np.geomspace(low, plenty, 200):
        found = plan(*arguments, int(budget) + 1)
        if not choices or found.seconds < choices[-1].seconds * (1 - args.gain):
            choices.append(found)
    seconds: list[list[float]] = [[] for _ in choices]
    peaks: list[int] = []
    with ExitStack() as stack:
        steps = []
        for choice in choices:  # the second step of each, beside what the others hold
            before = mx.get_active_memory()
            steps.append(stack.enter_context(planned.stepping(choice.plan)))
            steps[-1]()
            peaks.append(steps[-1]()[0] - before)
        for number in range(args.rounds):
            order = range(len(choices)) if number % 2 == 0 else reversed(range(len(choices)))
            for index in order:
                seconds[index].append(steps[index]()[1])
    print(
        "| budget MB | measured peak MB | expected s | median s | time of the one before | plan |"
    )
    print("|---|---|---|---|---|---|")
    medians = [float(np.median(some)) for some in seconds]
    for index, choice in enumerate(choices):
        ratios = [a / b for a, b in zip(seconds[index], seconds[max(0, index - 1)], strict=True)]
        words = choice.plan.describe(planned.shape.blocks)
        print(
            f"| {choice.needs / MB:.0f} | {peaks[index] / MB:.0f} | {choice.seconds:.2f} | "
            f"{medians[index]:.2f} | {np.median(ratios):.3f} | {words} |"
        )
    if args.plot:
        draw(args.plot, choices, peaks, medians)


def draw(file: Path, choices: list[Choice], peaks: list[int], medians: list[float]) -> None:
    """Time against budget, measured."""
    import matplotlib  # noqa: PLC0415 - an optional dependency

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    budgets = [choice.needs / MB for choice in choices]
    axis.step(budgets, medians, where="post", marker="o", label="measured, against the budget")
    axis.plot([p / MB for p in peaks], medians, "x", label="the same against the measured peak")
    axis.set(
        title="Step time against the memory budget",
        xlabel="MB of MLX's allocator",
        ylabel="seconds a step, median",
        xscale="log",
        ylim=(0, None),
    )
    axis.legend(loc="lower left")
    figure.savefig(file, dpi=110)


def fits(args: argparse.Namespace) -> None:
    """Print what the planner says of every shape and budget."""
    load = BatchShape(1, args.tokens, args.tokens // 2)
    for name in args.shapes:
        made = MADE[name]
        planned = Planned(args, Case(name, made, 128, 1, 8, "bfloat16", 0.5, None))
        machine = assumed(*args.rates) if args.rates else planned.machine
        blocks = SHAPES[name][1]
        shape = replace(planned.shape, blocks=blocks, adapted=blocks, by_block=())
        for budget in args.budgets:
            try:
                choice = plan(shape, load, machine, budget)
            except EdgeLoraError as error:
                print(f"{name}, {size(budget)}: {error}", flush=True)
                continue
            text = f"{size(choice.peak)} expected; {choice.plan.summary(blocks)}"
            if args.rates:
                text += f"; {choice.seconds:.0f} s a step"
            print(f"{name}, {size(budget)}: {text}", flush=True)


def assumed(flops: float, moved: float, read: float) -> Machine:
    """A GPU with these rates per second, and what follows from them for the others."""
    rates = Rates(
        flops=flops,
        fused_flops=flops,
        dequantized=moved / 2.5,  # half a byte is read and two are written
        moved=moved,
        read=read,
        written=read,
        call=1e-5,
    )
    return Machine("assumed", rates, ("fused", "dequantize"))


def collect(args: argparse.Namespace) -> None:
    """Append what phases of one shape need."""
    case = Case(args.shape, args.blocks, 128, 1, args.rank, args.dtype, 0.3, None)
    if args.dtype == "bfloat16":
        memory.stand_in(DTYPES[args.dtype])
    planned = Planned(args, case)
    planner_needs.collect(planned, Settings(args.cache, args.dtype), args.file)


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(stand_in=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("grid", help="expected and measured peaks of some 90 plans")
    one.add_argument("--skip", type=int, default=0, metavar="ROWS", help="that a run before made")
    one.add_argument("--shape", choices=SHAPES, help="rows of this shape alone")
    one.add_argument("--stand-in", action="store_true", help="for products of all rows")
    one.set_defaults(run=grid_of_plans)
    one = commands.add_parser("budgets", help="time against the budget")
    one.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    one.add_argument("--blocks", type=int, default=8)
    one.add_argument("--tokens", type=int, default=256)
    one.add_argument("--labelled", type=float, default=0.1, help="share of the tokens")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--gain", type=float, default=0.05, help="least of a plan over the last")
    one.add_argument("--plot", type=Path)
    one.set_defaults(run=budgets)
    one = commands.add_parser("fits", help="what fits into how much memory")
    one.add_argument("--shapes", choices=MADE, nargs="+", default=list(MADE))
    one.add_argument("--tokens", type=int, default=2048, help="of a row")
    one.add_argument("--budgets", type=float, nargs="+", default=BYTES, help="in bytes")
    one.add_argument(
        "--rates",
        type=float,
        nargs=3,
        metavar=("FLOPS", "MOVED", "READ"),
        help="of the machine, for the time of a step: operations, bytes in memory and bytes from "
        "the disk per second",
    )
    one.set_defaults(run=fits)
    one = commands.add_parser("collect", help="measure what phases need")
    one.add_argument("file", type=Path, help="gets a line for each phase")
    one.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    one.add_argument("--blocks", type=int, default=4)
    one.add_argument("--rank", type=int, default=8)
    one.add_argument("--dtype", choices=DTYPES, default="float32")
    one.set_defaults(run=collect)
    one = commands.add_parser("fit", help="fit the formula to phases")
    one.add_argument("files", type=Path, nargs="+")
    one.set_defaults(run=lambda args: planner_needs.fit(args.files))
    for command in commands.choices.values():
        command.add_argument("--cache", type=Path, default=default_cache())
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    mx.set_cache_limit(0)
    args.run(args)


if __name__ == "__main__":
    main()
