"""The host's share of a step: a deep, very thin model, where building graphs and calls are all.

    python benchmarks/overhead.py
    taskset -c 0 python benchmarks/overhead.py --rounds 30

28 blocks of 64 entries, 64 tokens, float32. A fast GPU waits for what takes the time here. All
steps are whole ones: loss, gradients, whether these are finite, AdamW. Contenders take turns, a
step each; every ratio is of two steps that followed one another, and the median is told.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import speed
from mlx_lm.models import llama

from mlx_edgelora.benchmark import shapes
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.finite import FiniteCheck
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import this_machine
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

BLOCKS, TOKENS, RANK = 28, 64, 8
RESIDENT = Plan(streamed_blocks=0, head="resident", inputs="memory", loss_bytes=160 * MIB)
PLANS = {
    "no limit": Plan(**(vars(RESIDENT) | {"kept_blocks": BLOCKS})),
    "all in memory, blocks recomputed": RESIDENT,
    "min": None,
}


def ours(folder: Path, plan: Plan | None, batch: object, stack: ExitStack) -> Callable[[], float]:
    """This package's step by a plan; None for the least memory."""
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    mx.random.seed(1)
    add_lora(lazy.model, -1, rank=RANK)
    if plan is None:
        shape = shape_of(checked_blocks(lazy.model), shapes.SHAPES["thin"][-1])
        load = BatchShape(1, TOKENS, int(batch.mask.sum()))
        plan = smallest(shape, load, this_machine(folder, folder, mx.float32)).plan
    engine = stack.enter_context(build_engine(lazy, plan, Settings(folder)))
    optimizer, finite = optimizers.AdamW(1e-5), FiniteCheck()
    engine.adapters.start(optimizer)

    def take(gradients: dict[str, mx.array]) -> None:
        finite.add(gradients)
        engine.adapters.add(gradients)

    def step() -> float:
        loss, _ = engine.backward(batch, take)
        value = loss.item()
        assert finite.first_bad() is None
        engine.adapters.update(optimizer, 1)
        return value

    step()
    return step


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache", type=Path, default=shapes.default_cache())
    args = parser.parse_args()
    shapes.SHAPES["thin"] = (llama, BLOCKS, 64, 128, 4, 2, 1024)
    folder = shapes.checkpoint(args.cache, "thin", BLOCKS, "float32")
    batch = speed.floor.random_batch(1024, TOKENS, 0.3)
    with ExitStack() as stack:
        steps = {
            "mlx-lm": speed.theirs(folder, RANK, batch, checkpointing=False),
            "mlx-lm, checkpointing": speed.theirs(folder, RANK, batch, checkpointing=True),
        }
        steps |= {name: ours(folder, plan, batch, stack) for name, plan in PLANS.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds):
            for name, step in steps.items():
                gc.collect()
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    print("| who | ms a step | over mlx-lm | over mlx-lm, checkpointing |\n|---|---|---|---|")
    for name, own in times.items():
        ratios = [
            statistics.median(mine / other for mine, other in zip(own, times[rival], strict=True))
            for rival in list(steps)[:2]
        ]
        print(
            f"| {name} | {1e3 * statistics.median(own):.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
