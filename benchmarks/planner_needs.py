"""The numbers of the planner's formula, fitted to measured phases; `planner.py` runs it."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_edgelora.engine.build import Settings, build_engine
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


def collect(planned: Any, settings: Settings, file: Path) -> None:
    """Append what phases need.

    Args:
        planned: a model, as `planner.Planned`.
        settings: of its engines.
        file: gets a line for each phase.
    """
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
            with build_engine(planned.lazy(), plan, settings) as engine:
                spent = sample(engine, RunPlan(*arguments))
            print(f"{batch_shape}, {plan.tile_tokens or 'all'} tokens, {spent:.1f} s", flush=True)
            with file.open("a") as target:
                for kind, way, measured, taken in measurements.rows():
                    row = [asdict(planned.shape), kind, way, asdict(measured), taken.bytes]
                    target.write(json.dumps(row) + "\n")


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
