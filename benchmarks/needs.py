"""The numbers of the planner's formula, fitted to phases that are measured on this machine.

    python benchmarks/needs.py --collect phases.jsonl --shape llama-3.2-1b --blocks 4 --rank 4
    python benchmarks/needs.py --fit phases.jsonl other.jsonl

`--collect` measures phases of one shape as a run does before its first step
(`training/sampling.py`), for several batches and ways to compute them, and appends a line for
each. `--fit` prints for every kind of phase the numbers for the terms of `planner/needs.py`, none
below 0, with the least relative error, and how far off these and the present ones are; it needs
scipy. Products of bfloat16 are a stand-in's (`benchmarks/floor.py`).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import floor
import mlx.core as mx
import numpy as np
from plans import Case, Planned

from mlx_edgelora.benchmark.shapes import default_cache
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.model.loading import DTYPES
from mlx_edgelora.planner.measured import Measurements
from mlx_edgelora.planner.needs import MIB, TERMS, sizes_of
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.run_plan import Budget, RunPlan
from mlx_edgelora.planner.search import expected
from mlx_edgelora.planner.sizes import BatchShape, ModelShape
from mlx_edgelora.training.sampling import sample

# rows, tokens, and the share of them that is labelled
LOADS = ((1, 128, 1.0), (2, 256, 0.3), (1, 512, 0.3), (1, 1024, 0.3), (1, 2048, 0.1))
# What errors of small phases are relative to at least.
FLOOR_BYTES = 4 * MIB


def ways(batch_shape: BatchShape) -> Iterator[Plan]:
    """Plans whose phases are measured."""
    base = Plan(kernel="dequantize", adapters="paged", prefetch=False)
    for mlp_bytes, loss_bytes in ((None, 16 * MIB), (16 * MIB, 40 * MIB)):
        yield replace(base, mlp_bytes=mlp_bytes, loss_bytes=loss_bytes)
    for tokens in (256, 512, 1024):
        if tokens < batch_shape.size:
            yield replace(base, tile_tokens=tokens, mlp_bytes=16 * MIB)
            yield replace(base, tile_tokens=tokens, loss_bytes=640 * MIB)
    if batch_shape.size <= 1024:
        for head in ("streamed", "resident"):
            yield replace(base, kept_blocks=2, head=head)


def collect(args: argparse.Namespace) -> None:
    """Append what phases of one shape need."""
    case = Case(args.shape, args.blocks, 128, 1, args.rank, args.dtype, 0.3, None)
    planned = Planned(args, case)
    if args.dtype == "bfloat16":
        floor.stand_in(DTYPES[args.dtype])
    for rows, tokens, share in LOADS:
        batch_shape = BatchShape(rows, tokens, max(1, round(rows * tokens * share)))
        for plan in ways(batch_shape):
            measurements = Measurements()
            choice = expected(planned.shape, batch_shape, planned.machine, plan, measurements)
            budget = Budget(10**12, "to be measured")
            arguments = (
                planned.shape,
                batch_shape,
                planned.machine,
                budget,
                choice,
                {},
                True,
                measurements,
            )
            with build_engine(planned.lazy(), plan, Settings(args.cache, args.dtype)) as engine:
                spent = sample(engine, RunPlan(*arguments))
            print(f"{batch_shape}, {plan.tile_tokens or 'all'} tokens, {spent:.1f} s", flush=True)
            with args.collect.open("a") as file:
                for kind, way, measured, taken in measurements.rows():
                    row = [asdict(planned.shape), kind, way, asdict(measured), taken.bytes]
                    file.write(json.dumps(row) + "\n")


def fit(files: list[Path]) -> None:
    """Print numbers for the terms of every kind, and errors in percent."""
    from scipy.optimize import nnls  # noqa: PLC0415 - for this alone

    found = defaultdict(list)
    for line in (line for file in files for line in file.read_text().splitlines()):
        shape, kind, way, batch_shape, size = json.loads(line)
        sizes = sizes_of(kind, ModelShape(**shape), tuple(way), BatchShape(**batch_shape))
        found[kind].append(([sizes.get(name, 0.0) for name in TERMS[kind]], size))
    for kind, terms in TERMS.items():
        if not found[kind]:
            continue
        x, y = (np.array(part, float) for part in zip(*found[kind], strict=True))
        scale = y + FLOOR_BYTES
        numbers, _ = nnls(x / scale[:, None], y / scale)
        fitted = dict(zip(terms, np.round(numbers, 1).tolist(), strict=True))
        print(f"{kind}, {len(y)} phases: {fitted}")
        for name, those in (("fitted", numbers), ("present", list(terms.values()))):
            errors = 100 * (x @ np.array(those) - y) / scale
            mean, low, high = np.abs(errors).mean(), errors.min(), errors.max()
            print(f"  {name}: {mean:.0f} % off on average, from {low:+.0f} to {high:+.0f} %")


def main() -> None:
    """Collect or fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--collect", type=Path, metavar="FILE", help="append phases to this file")
    what.add_argument("--fit", type=Path, nargs="+", metavar="FILE", help="fit to these files")
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="of the model (%(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="of it (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of adapters (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of random models")
    args = parser.parse_args()
    mx.set_cache_limit(0)
    if args.fit:
        fit(args.fit)
    else:
        args.cache.mkdir(parents=True, exist_ok=True)
        collect(args)


if __name__ == "__main__":
    main()
