"""The largest batch of a run, computed once before the first step: does its plan keep the budget?

What MLX's allocator holds beside what is known for certain differs from device to device and from
version to version, so an expected peak is checked by a real one, and replaced.
"""

from collections.abc import Callable

import numpy as np

from mlx_edgelora.blocks.dropout import generator_restored
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.measure.meter import peak_memory, reset_peak
from mlx_edgelora.planner.cost import Load
from mlx_edgelora.planner.run_plan import RunPlan, gigabytes

# A plan that is expected to take less than this share of its budget is not tried.
NEAR = 0.5
# So often at most; each plan takes less than the one before.
TRIES = 3


def rehearse(engine: Engine, chosen: RunPlan, notify: Callable[[str], None]) -> None:
    """Compute the largest batch there can be, and have less used until it fits the budget.

    No parameter changes, and no random number is drawn. Nothing is done where a plan was given.

    Raises:
        EdgeLoraError: no plan fits.
    """
    budget = chosen.budget.bytes
    if budget is None or chosen.choice.peak < NEAR * budget:
        return
    batch = synthetic_batch(chosen.load, chosen.shape.vocabulary)
    for _ in range(TRIES):
        reset_peak()
        with generator_restored():
            engine.backward(batch, lambda gradients: gradients.clear())
        peak = peak_memory() + chosen.unseen_bytes
        plan = chosen.corrected(peak)
        if plan is None:
            return
        engine.hold(plan)
        notify(f"a first try took {gigabytes(peak)}; new {chosen.table()}")


def synthetic_batch(load: Load, vocabulary: int) -> Batch:
    """Random tokens, in each row as many of the last ones labelled as there can be."""
    shape = load.rows, load.tokens + 1
    tokens = np.random.RandomState(0).randint(0, vocabulary, shape).astype(np.int32)
    labelled = min(load.tokens, -(-load.labelled // load.rows))
    lengths = np.array([[shape[1] - labelled, shape[1]]] * load.rows, np.int32)
    return Batch(tokens, lengths, tuple(range(load.rows)))
