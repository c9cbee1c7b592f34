"""The largest batch of a run, computed once before the first step: does its plan keep the budget?

An expected peak is checked by a real one, and the plan is replaced where it was too low.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.dropout import restore_generator
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.measure.meter import peak_memory, reset_peak
from mlx_edgelora.measure.profile import PhasePeak, recording
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.measured import Measurement
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.training import summary

# A plan that is expected to take less than this share of its budget is not tried.
NEAR = 0.5
# So often at most; each plan takes less than the one before.
TRIES = 3


def rehearse(engine: Engine, chosen: RunPlan, log: Callable[[str], None]) -> None:
    """Compute the largest batch there can be, and have less used until it fits the budget.

    No parameter changes, and no random number is drawn. Nothing is done where a plan was given, or
    where this was done in an earlier run.

    Raises:
        EdgeLoraError: no plan fits.
    """
    budget = chosen.budget.bytes
    if budget is None or chosen.choice.peak < NEAR * budget:
        return
    batch = synthetic_batch(chosen.batch_shape, chosen.shape.vocabulary)
    for _ in range(TRIES):
        before = chosen.measurements.find("step", chosen.step_key, chosen.batch_shape)
        if before is not None and before.bytes <= budget:
            return
        with restore_generator():
            measure_pass(engine, batch, chosen.plan.adapters == "resident")
        peak = peak_memory() + chosen.optimizer_bytes
        chosen.measurements.add("step", chosen.step_key, chosen.batch_shape, Measurement(peak, 0.0))
        chosen.measurements.write()
        plan = chosen.replan(peak)
        if plan is None:
            return
        engine.set_plan_and_residency(plan)
        message = f"the largest batch took {size(peak)}, above the budget: another plan is chosen"
        message = summary.line("rehearsed", message)
        log(f"{message}\n{summary.memory(chosen)}")


def measure_pass(engine: Engine, batch: Batch, keeps: bool) -> tuple[list[PhasePeak], int]:
    """Compute a batch forward and backward; gradients are kept as a step keeps them, or not.

    Returns:
        What each phase took, and bytes that were held before.
    """
    gradients: list[Arrays] = []
    take = gradients.append if keeps else lambda found: found.clear()
    mx.synchronize()
    reset_peak()
    with recording() as profile:
        profile.begin_step()
        base = mx.get_active_memory()
        engine.backward(batch, take)
        mx.synchronize()
        profile.finish()
    return profile.entries, base


def synthetic_batch(batch_shape: BatchShape, vocabulary: int) -> Batch:
    """Random tokens, in each row as many of the last ones labelled as there can be.

    Rows that share a row are all of one length.
    """
    shape = batch_shape.rows, batch_shape.tokens + 1
    tokens = np.random.RandomState(0).randint(0, vocabulary, shape).astype(np.int32)
    labelled = min(batch_shape.tokens, -(-batch_shape.labelled // batch_shape.rows))
    mask = np.zeros((batch_shape.rows, batch_shape.tokens), bool)
    mask[:, batch_shape.tokens - labelled :] = True
    starts = None
    if batch_shape.context:
        places = np.arange(batch_shape.tokens, dtype=np.int32)
        starts = np.repeat((places - places % batch_shape.context)[None], batch_shape.rows, 0)
    return Batch(tokens, mask, tuple(range(batch_shape.rows)), starts)
