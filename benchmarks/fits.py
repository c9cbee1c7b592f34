"""What fits into how much memory: the table of the README, by the planner's formula.

    python benchmarks/fits.py

For each shape a block or a few of random 4-bit weights are made, and the planner is asked about
the model of full depth: one row of 2048 tokens, half of them labelled, bfloat16, rank 8 on all
blocks. Nothing is computed. Memory is the formula's; which of two ways is faster follows from
the rates of the machine that this runs on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from plans import Case, Planned

from mlx_edgelora.benchmark.shapes import SHAPES, default_cache
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.search import plan
from mlx_edgelora.planner.sizes import BatchShape

# Blocks that are made of each shape.
MADE = {"llama-3.2-1b": 4, "llama-3.2-3b": 3, "llama-3.1-8b": 1, "llama-3.3-70b": 1}
BUDGETS = (4 * 10**9, 10 * 10**9, 22 * 10**9)
LOAD = BatchShape(1, 2048, 1024)


def main() -> None:
    """Print what the planner says of every shape and budget."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of random models")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    for name, made in MADE.items():
        planned = Planned(args, Case(name, made, 128, 1, 8, "bfloat16", 0.5, None))
        blocks = SHAPES[name][1]
        shape = replace(planned.shape, blocks=blocks, adapted=blocks)
        for budget in BUDGETS:
            choice = plan(shape, LOAD, planned.machine, budget)
            text = f"{size(choice.peak)} expected; {choice.plan.summary(blocks)}"
            print(f"{name}, {size(budget)}: {text}", flush=True)


if __name__ == "__main__":
    main()
