"""The largest batch of a run, computed once before the first step: does its plan keep the budget?

An expected peak is checked by a real one, and the plan is replaced where it was too low.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.dropout import generator_restored
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.engine.visits import Arrays
from mlx_edgelora.measure.meter import peak_memory, reset_peak
from mlx_edgelora.measure.profile import Stretch, recording
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.measured import Taken
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.planner.sizes import Load
from mlx_edgelora.training import summary

# A plan that is expected to take less than this share of its budget is not tried.
NEAR = 0.5
# So often at most; each plan takes less than the one before.
TRIES = 3


def rehearse(engine: Engine, chosen: RunPlan, notify: Callable[[str], None]) -> None:
    """Compute the largest batch there can be, and have less used until it fits the budget.

    No parameter changes, and no random number is drawn. Nothing is done where a plan was given, or
    where this was done in an earlier run.

    Raises:
        EdgeLoraError: no plan fits.
    """
    budget = chosen.budget.bytes
    if budget is None or chosen.choice.peak < NEAR * budget:
        return
    batch = synthetic_batch(chosen.load, chosen.shape.vocabulary)
    for _ in range(TRIES):
        before = chosen.known.of("step", chosen.whole, chosen.load)
        if before is not None and before.bytes <= budget:
            return
        with generator_restored():
            passed(engine, batch, chosen.plan.adapters == "resident")
        peak = peak_memory() + chosen.unseen_bytes
        chosen.known.add("step", chosen.whole, chosen.load, Taken(peak, 0.0))
        chosen.known.write()
        plan = chosen.corrected(peak)
        if plan is None:
            return
        engine.hold(plan)
        told = f"the largest batch took {size(peak)}: another plan is due"
        told = summary.line("rehearsed", told)
        notify(f"{told}\n{summary.memory(chosen)}")


def passed(engine: Engine, batch: Batch, keeps: bool) -> tuple[list[Stretch], int]:
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
    return profile.stretches, base


def synthetic_batch(load: Load, vocabulary: int) -> Batch:
    """Random tokens, in each row as many of the last ones labelled as there can be.

    Rows that share a row are all of one length.
    """
    shape = load.rows, load.tokens + 1
    tokens = np.random.RandomState(0).randint(0, vocabulary, shape).astype(np.int32)
    labelled = min(load.tokens, -(-load.labelled // load.rows))
    mask = np.zeros((load.rows, load.tokens), bool)
    mask[:, load.tokens - labelled :] = True
    starts = None
    if load.context:
        places = np.arange(load.tokens, dtype=np.int32)
        starts = np.repeat((places - places % load.context)[None], load.rows, 0)
    return Batch(tokens, mask, tuple(range(load.rows)), starts)
