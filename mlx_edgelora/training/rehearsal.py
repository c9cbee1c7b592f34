"""Rehearsal: the largest batch of a run is computed once before the first step.

The measured peak is compared with the budget, and the plan is replaced if the peak is larger.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.dropout import restore_generator
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.adapter_state import add_to
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import memory_limit, peak_memory, reset_peak
from mlx_edgelora.measure.profile import PhasePeak, recording
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.measured import Measurement
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.training import summary

# A plan with an expected peak below this share of its budget is not rehearsed.
NEAR = 0.5
# Largest number of rehearsals; each plan needs less memory than the one before.
TRIES = 3


class AnotherEngineError(EdgeLoraError):
    """The plan that fits the budget needs another engine, which reads its weights again.

    Attributes:
        chosen: the run with that plan.
    """

    def __init__(self, chosen: RunPlan) -> None:
        super().__init__(chosen.plan.reason)
        self.chosen = chosen


def rehearse(engine: Engine, chosen: RunPlan, log: Callable[[str], None]) -> None:
    """Compute the largest possible batch, and replace the plan until the peak fits the budget.

    Parameters and the state of the random generator do not change. Nothing is computed without a
    budget, if the expected peak is far below it, or if an earlier run measured a peak that fits.

    Args:
        engine: gets the new plan.
        chosen: the run; its plan and measurements are updated.
        log: called with a line for every new plan.

    Raises:
        AnotherEngineError: a plan fits, but not in this engine.
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
        # MLX allocates ahead as far as its limit allows. A step has the optimizer's state as well.
        room = max(1, chosen.memory_limit - chosen.optimizer_bytes)
        keeps = chosen.plan.adapters == "resident"
        with restore_generator(), memory_limit(room):
            measure_pass(engine, batch, keeps, chosen.shape.accumulates)
        peak = peak_memory() + chosen.optimizer_bytes
        chosen.measurements.add("step", chosen.step_key, chosen.batch_shape, Measurement(peak, 0.0))
        chosen.measurements.write()
        message = f"the largest batch took {size(peak)}, above the budget: another plan is chosen"
        message = summary.line("rehearsed", message)
        try:
            plan = chosen.replan(peak)
        except EdgeLoraError:
            another = chosen.replanned_anew(peak)
            log(message)
            raise AnotherEngineError(another) from None
        if plan is None:
            return
        engine.set_plan_and_residency(plan)
        log(f"{message}\n{summary.memory(chosen)}")


def measure_pass(
    engine: Engine, batch: Batch, keeps: bool, accumulates: bool = False
) -> tuple[list[PhasePeak], int]:
    """Compute the gradients of a batch and measure memory and time.

    Args:
        engine: computes the batch.
        batch: the batch.
        keeps: keep all gradients in memory, as a step with resident adapters does.
        accumulates: if they are kept, add them to those of an earlier batch, which are zeros.

    Returns:
        Peak and time of each phase, and bytes in memory before the batch.
    """
    gradients: Arrays = {}
    if keeps and accumulates:
        trained = tree_flatten(engine.model.trainable_parameters())
        gradients = {name: mx.zeros_like(value) for name, value in trained}
        mx.eval(gradients)

    def take(found: Arrays) -> None:
        if keeps:
            add_to(found, gradients)
        else:
            found.clear()

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
    """A batch of random tokens with the largest number of labels, at the end of each row.

    In a packed batch all packed rows have the same length.
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
