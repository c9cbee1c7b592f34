"""Probes of training: gradients compared with plain MLX, and steps within several budgets."""

import gc
import time
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from mlx_edgelora.benchmark.shapes import checkpoint
from mlx_edgelora.checkup.job import Checkup, Found, run_probe
from mlx_edgelora.checkup.probes import on_gpu
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG
from mlx_edgelora.engine.optimizer import build_optimizer
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import footprint, peak_memory, reset_peak
from mlx_edgelora.planner.machine import default_budget
from mlx_edgelora.training.inspecting import verification
from mlx_edgelora.training.opening import open_planned
from mlx_edgelora.training.rehearsal import rehearse, synthetic_batch


def verify(job: Checkup) -> Found:
    """Compare the gradients of the embedded model with those of plain MLX."""
    job.check_time()
    places = {"spill_dir": str(job.folder), "cache_dir": str(job.folder)}
    config = TrainConfig.from_layers((read_yaml(DEFAULT_CONFIG), None), (places, None))
    verdicts = verification(config, _quiet)
    return {
        "comparisons": len(verdicts),
        "largest_error": max(verdict.error for verdict in verdicts),
        "wrong": [f"{verdict}: {verdict.problem}" for verdict in verdicts if verdict.problem],
    }


def steps(job: Checkup) -> Found:
    """Run steps of a small random model within the least memory, twice as much, and plenty."""
    sizes = job.sizes
    options = {
        "model": str(checkpoint(job.folder, sizes.shape, sizes.blocks)),
        "spill_dir": str(job.folder),
        "cache_dir": str(job.folder),
        "num_layers": -1,
        "batch_size": sizes.rows,
        "max_seq_length": sizes.row_tokens + 1,
        "optimizer": "adamw",
        # The checkpoint's dtype is bfloat16, which is slow on a CPU.
        "dtype": None if on_gpu() else "float32",
    }
    least = run_probe(_run_steps, job, options, "min")
    twice = run_probe(_run_with_twice, job, options, least)
    plenty = run_probe(_run_steps, job, options, default_budget()[0])
    rows = {"least": least, "twice": twice, "plenty": plenty}
    return {
        "model": f"{sizes.shape}, {sizes.blocks} blocks, 4 bits",
        "batch": f"{sizes.rows} x {sizes.row_tokens} tokens",
        "dtype": options["dtype"] or "bfloat16",
        "steps": [{"name": name} | row for name, row in rows.items()],
    }


def _run_with_twice(job: Checkup, options: dict[str, Any], least: Found) -> Found:
    if "error" in least:
        raise EdgeLoraError("skipped: the smallest budget is not known")
    return _run_steps(job, options, 2 * least["needs_bytes"])


def _run_steps(job: Checkup, options: dict[str, Any], budget: int | str) -> Found:
    """Run steps within a budget, as training does."""
    job.check_time()
    gc.collect()  # engines contain reference cycles
    config = TrainConfig.from_dict(options | {"memory_budget": budget})
    with open_planned(config, _quiet) as (engine, chosen):
        rehearse(engine, chosen, _quiet)
        optimizer, choice = build_optimizer(config), chosen.choice
        engine.adapters.start(optimizer)
        batch, spent = synthetic_batch(chosen.batch_shape, chosen.shape.vocabulary), []
        gc.collect()
        mx.synchronize()
        reset_peak()
        for _ in range(job.sizes.steps):
            start = time.perf_counter()
            loss, _ = engine.backward(batch, engine.adapters.add)
            engine.adapters.update(optimizer, 1)
            mx.eval(loss)
            spent.append(time.perf_counter() - start)
        return {
            # With "min" there is no budget. The plan's needs are used instead, as in MLX's limit.
            "budget_bytes": chosen.budget.bytes or choice.needs,
            "expected_bytes": choice.peak,
            "needs_bytes": choice.needs,
            "measured_bytes": peak_memory(),
            "expected_seconds": choice.seconds,
            "seconds": min(spent[1:]),
            "footprint_bytes": footprint(),
            "plan": asdict(choice.plan),
            "shape": asdict(chosen.shape),
            # The measured phases of a step. `benchmarks/planner.py` fits the planner's formula to
            # these rows.
            "phases": [
                {"kind": kind, "way": way, "load": batch_shape.sizes(), **asdict(taken)}
                for kind, way, batch_shape, taken in chosen.measurements.rows()
            ],
        }


def _quiet(line: str) -> None:
    """Discard the messages of a run."""
