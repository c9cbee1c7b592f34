"""MLX's memory limits during a run, and watches for the budget and for memory pressure."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import can_limit_memory, memory_pressure, peak_memory
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.training import summary
from mlx_edgelora.training.callbacks import TrainingCallback


@contextmanager
def limits(chosen: RunPlan) -> Iterator[Callable[[RunPlan], None]]:
    """Set MLX's memory and cache limits for a plan, and restore them on exit.

    No limit is raised above its earlier value. The wired limit is not changed, because with one
    macOS would wire and unwire every new and freed buffer. The memory limit is not changed where
    `can_limit_memory` says that MLX would wait at it for good.

    Args:
        chosen: the run with its plan.

    Yields:
        A function that sets the limits for another plan.
    """
    before: dict[Callable[[int], int], int] = {}
    limits_memory = can_limit_memory()

    def keep(chosen: RunPlan) -> None:
        wanted = {mx.set_cache_limit: chosen.cache_bytes}
        if limits_memory:
            wanted[mx.set_memory_limit] = chosen.memory_limit
        for change, value in wanted.items():
            found = change(value)
            change(min(before.setdefault(change, found), value))

    keep(chosen)
    try:
        yield keep
    finally:
        for change, value in before.items():
            change(value)


class PressureWatch(TrainingCallback):
    """Warns once if the system is short of memory; only where the system reports this."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log, self._logged = log, False

    def on_train_loss_report(self, train_info: dict) -> None:
        """Check the memory pressure; called at every report of a training loss."""
        level = None if self._logged else memory_pressure()
        if level is not None:
            self._logged = True
            self._log(
                f"warning: macOS is short of memory (pressure: {level}), so this run and other "
                "programs slow down; close some of them, or start again with a smaller "
                "--memory-budget"
            )


class BudgetWatch(TrainingCallback):
    """Compares the peak with the budget, and replaces the plan if the peak was too high."""

    def __init__(
        self,
        engine: Engine,
        chosen: RunPlan,
        log: Callable[[str], None],
        note: Callable[[str, Any], None],
    ) -> None:
        self._engine, self._chosen, self._log, self._note = engine, chosen, log, note

    def on_train_loss_report(self, train_info: dict) -> None:
        """Check the peak; called at every report of a training loss."""
        peak = peak_memory()
        message = f"the peak of {size(peak)} is higher than expected"
        try:
            plan = self._chosen.replan(peak, anew=False)
        except EdgeLoraError as error:
            self._log(f"{message}; the run continues, but {error}")
            return
        if plan is not None:
            self._engine.set_plan_and_residency(plan)
            self._log(f"{message}; new plan\n{summary.memory(self._chosen)}")
            self._note("plan", summary.plan_record(self._chosen))
