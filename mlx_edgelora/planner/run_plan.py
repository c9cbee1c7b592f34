"""Plan a run from its options, and replan it if it exceeds its budget."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import Batch
from mlx_edgelora.data.batches import largest_batch
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.text import named_rows, wrapped
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import DTYPES
from mlx_edgelora.planner.cost import MOMENTS
from mlx_edgelora.planner.machine import Machine, default_budget, this_machine
from mlx_edgelora.planner.measured import Measurements
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.search import Choice, expected, plan, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

# Share of the budget that is MLX's memory limit.
LIMIT = 0.95
# Shorter batches have plans of their own; their length is rounded up to one of this many steps.
STEPS = 8
# Fields of the plan that are the same for all batches of a run.
FIXED_AT_START = (
    "streamed_blocks",
    "head",
    "prefetch",
    "adapters",
    "kernel",
    "loss_bytes",
    "cache_bytes",
)


@dataclass(frozen=True)
class Budget:
    """The memory budget of MLX in bytes, None for no budget, and the reason for it."""

    bytes: int | None
    why: str


class RunPlan:
    """The plans of a run, for its largest batch and for smaller ones.

    Args:
        shape: sizes of the adapted model.
        batch_shape: sizes of the largest batch.
        machine: the machine.
        budget: the memory budget.
        choice: the plan of the largest batch; None before the search.
        fixed: fields of the plan that are set by options.
        varies: whether smaller batches may have other plans.
        measurements: measurements of the model.
        given: whether the plan was given by the user and does not change.
    """

    def __init__(
        self,
        shape: ModelShape,
        batch_shape: BatchShape,
        machine: Machine,
        budget: Budget,
        choice: Choice | None,
        fixed: dict[str, Any],
        varies: bool,
        measurements: Measurements,
        given: bool = False,
    ) -> None:
        self.shape, self.batch_shape, self.machine, self.budget = (
            shape,
            batch_shape,
            machine,
            budget,
        )
        self.choice, self.fixed, self._varies, self.measurements = (
            choice,
            fixed,
            varies,
            measurements,
        )
        self.given = given
        self._variants: dict[BatchShape, Plan] = {}
        self._highest = budget.bytes or 0  # highest peak that the present plan accounts for

    @property
    def plan(self) -> Plan:
        """The plan of the largest batch."""
        return self.choice.plan

    def with_choice(self, choice: Choice) -> "RunPlan":
        """The same run with another plan."""
        arguments = self.shape, self.batch_shape, self.machine, self.budget
        return RunPlan(*arguments, choice, self.fixed, self._varies, self.measurements, self.given)

    def search(self, fixed: dict[str, Any] | None = None) -> Choice:
        """Find the fastest plan within the budget; without a budget, the smallest plan.

        Args:
            fixed: further fields that are fixed, in addition to those set by options.

        Raises:
            EdgeLoraError: no plan fits the budget.
        """
        arguments = self.shape, self.batch_shape, self.machine
        fixed, most = self.fixed | (fixed or {}), self.budget.bytes
        if most is None:
            found, reason = smallest(*arguments, fixed, self.measurements), self.budget.why
        else:
            found = plan(*arguments, most, fixed, self.measurements)
            reason = f"the fastest within {size(most)}"
        return replace(found, plan=replace(found.plan, reason=reason))

    def smallest(self) -> Choice:
        """The plan with the lowest memory."""
        return smallest(self.shape, self.batch_shape, self.machine, self.fixed, self.measurements)

    def expected(self, plan: Plan) -> Choice:
        """The expected memory and time of another plan."""
        return expected(self.shape, self.batch_shape, self.machine, plan, self.measurements)

    @property
    def step_key(self) -> tuple[object, ...]:
        """All that decides the memory and time of a step of a given model and batch shape."""
        named = asdict(self.plan)
        named.pop("reason")
        return *named.values(), self.shape.accumulates

    @property
    def fixed_at_start(self) -> dict[str, Any]:
        """The fields of the present plan that cannot change once weights are loaded."""
        # Resident weights of the model stay in memory; weights read from disk can be freed.
        names = [n for n in FIXED_AT_START if n != "streamed_blocks" or not self.plan.streams]
        return {name: getattr(self.plan, name) for name in names}

    def plan_for(self, batch: Batch) -> Plan:
        """The plan of a batch: the run's plan, or a faster one if the batch is smaller."""
        rows, tokens = batch.tokens.shape[0], batch.tokens.shape[1] - 1
        step = max(1, -(-self.batch_shape.tokens // STEPS))
        tokens = min(self.batch_shape.tokens, -(-tokens // step) * step)
        if not self._varies or tokens == self.batch_shape.tokens:
            return self.plan
        labelled = min(self.batch_shape.labelled, rows * tokens)
        batch_shape = replace(self.batch_shape, rows=rows, tokens=tokens, labelled=labelled)
        if batch_shape not in self._variants:
            fixed = self.fixed | {name: getattr(self.plan, name) for name in FIXED_AT_START}
            arguments = self.shape, batch_shape, self.machine, self.budget.bytes
            try:
                self._variants[batch_shape] = plan(*arguments, fixed, self.measurements).plan
            except EdgeLoraError:  # no plan is expected to fit; the run's plan fits larger batches
                self._variants[batch_shape] = self.plan
        return self._variants[batch_shape]

    def replan(self, measured: int, anew: bool = True) -> Plan | None:
        """Find a smaller plan if a run has exceeded its budget.

        Args:
            measured: peak of MLX's allocator in bytes.
            anew: whether the peak was measured with the present plan. If not, it is the highest
                peak so far, which an earlier plan may have caused.

        Returns:
            The new plan, or None if the present plan stays within the budget.

        Raises:
            EdgeLoraError: no plan fits the budget.
        """
        highest, self._highest = self._highest, max(self._highest, measured)
        if not self._varies or measured <= (self.budget.bytes if anew else highest):
            return None
        self.choice = self._search_corrected(measured, self.fixed_at_start)
        self._variants.clear()
        return self.plan

    def replanned_anew(self, measured: int) -> "RunPlan":
        """The run with the best plan of all, also if it needs another engine.

        Args:
            measured: peak of MLX's allocator in bytes, measured with the present plan.

        Raises:
            EdgeLoraError: no plan fits the budget.
        """
        return self.with_choice(self._search_corrected(measured, None))

    def _search_corrected(self, measured: int, fixed: dict[str, Any] | None) -> Choice:
        """Correct the expected peaks by a measured one, and search; nothing changes on failure."""
        before = self.measurements.correction
        self.measurements.correction = before * max(1.02, measured / self.choice.peak)
        try:
            return self.search(fixed)
        except EdgeLoraError:
            self.measurements.correction = before
            raise

    @property
    def memory_limit(self) -> int:
        """MLX's memory limit in bytes. Nothing else bounds how far MLX allocates ahead.

        It is a little below the budget, because MLX looks at the limit after it has allocated what
        an operation needs, and on a GPU all operations that it has collected but not begun.
        """
        if self.budget.bytes is None:
            return self.choice.needs
        return round(LIMIT * self.budget.bytes)

    @property
    def cache_bytes(self) -> int:
        """Bytes of freed buffers that MLX may cache: the budget's rest above the expected peak."""
        spare = 0 if self.budget.bytes is None else self.budget.bytes - self.choice.peak
        return max(self.plan.cache_bytes, spare)

    @property
    def is_tight(self) -> bool:
        """Whether the budget leaves no room for a larger cache than the plan's."""
        return not self.given and self.cache_bytes == self.plan.cache_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer state, which a forward and a backward alone do not need."""
        shape = self.shape
        first = shape.blocks if self.plan.adapters == "paged" else shape.blocks - shape.adapted
        blocks = shape.trained_bytes(first, shape.blocks)
        return MOMENTS * (blocks + shape.outside_adapter_bytes)

    def table(self) -> str:
        """The plan, its budget and its expected peak as text."""
        most = self.budget.bytes
        limit = "no limit" if most is None else f"{size(most)} at most"
        head = (
            f"plan for {self.batch_shape.rows} x {self.batch_shape.tokens} tokens: "
            f"{size(self.choice.peak)} expected{self._by_formula}, {limit} ({self.budget.why})"
        )
        rows = named_rows(self.plan.rows(self.shape.blocks), 20, indent=2)
        return "\n".join([wrapped(head), *rows])

    @property
    def _by_formula(self) -> str:
        return " (not measured yet)" if self.measurements.is_empty else ""


def plan_request(
    config: TrainConfig,
    lazy: LazyModel,
    datasets: Sequence,
    cache: Path,
    folder: Path,
    labelled: float = 1.0,
) -> RunPlan:
    """Collect the inputs of a plan from the options of a run, and read a given plan.

    Args:
        config: the options of the run.
        lazy: the adapted model; its weights are not read.
        datasets: the data sets. The plan is made for their largest batch, or for max_seq_length
            if there are none.
        cache: folder with the measurements of this machine.
        folder: folder of scratch files.
        labelled: share of tokens with labels if there are no data sets.

    Returns:
        The run's plan; without a given plan, `search` still has to find one.

    Raises:
        EdgeLoraError: a given plan is invalid, or `folder` cannot be written.
    """
    dtype = DTYPES[config.dtype] if config.dtype else None
    blocks = lazy.blocks or checked_blocks(lazy.model)
    shape = shape_of(blocks, lazy.vocabulary, dtype)
    shape = replace(shape, accumulates=config.grad_accumulation_steps > 1)
    batch_shape = _largest_batch_shape(config, datasets, labelled)
    machine = this_machine(cache, folder, dtype or blocks.hidden_dtype)
    arguments = shape, batch_shape, machine
    measurements = _read_measurements(config, lazy, shape, cache / "measured.json", machine)
    if config.plan:
        choice = expected(*arguments, Plan.read(config.plan), measurements)
        budget = Budget(None, f"as {config.plan} says")
        return RunPlan(*arguments, budget, choice, {}, False, measurements, given=True)
    if config.memory_budget == "min":
        budget = Budget(None, "as little as possible")
        return RunPlan(*arguments, budget, None, _fixed(config), False, measurements)
    budget = Budget(config.memory_budget, "as given")
    if config.memory_budget is None:
        budget = Budget(*default_budget())
    return RunPlan(*arguments, budget, None, _fixed(config), True, measurements)


def _largest_batch_shape(config: TrainConfig, datasets: Sequence, labelled: float) -> BatchShape:
    """Sizes of the largest batch."""
    most = largest_batch(datasets, config.batch_size, config.max_seq_length, config.packing)
    together = 2 if config.compares_pairs else 1
    if not most.tokens:
        rows, tokens = together * config.batch_size, config.max_seq_length - 1
        labels = max(1, round(labelled * rows * tokens))
        return BatchShape(rows, tokens, labels, together=together)
    context = most.context if config.packing else 0
    return BatchShape(most.rows, most.tokens, most.labels, context, together)


def _read_measurements(
    config: TrainConfig, lazy: LazyModel, shape: ModelShape, file: Path, machine: Machine
) -> Measurements:
    """The measurements of earlier runs with the same model, options and machine."""
    trained = config.fine_tune_type, asdict(config.lora_parameters), config.loss
    # Phases are measured without gradients of earlier batches, whose bytes are known exactly.
    facts = [lazy.config, asdict(replace(shape, accumulates=False)), trained, machine.key]
    text = json.dumps(facts, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    measurements = Measurements(file, key, mx.default_device() == mx.gpu)
    measurements.read()
    return measurements


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """The fields of a plan that are set by options."""
    fixed: dict[str, Any] = {}
    if config.weights is not None:
        resident = config.weights == "resident"
        fixed |= {"streamed_blocks": 0 if resident else None, "head": config.weights}
    if config.activations is not None:
        fixed["inputs"] = "memory" if config.activations == "ram" else "file"
        if config.activations == "spill":  # all of them, even if the budget has room
            fixed["kept_blocks"] = 0
    if config.adapters is not None:
        fixed["adapters"] = config.adapters
    if config.kernel != "auto":
        fixed["kernel"] = config.kernel
    if config.kernel == "fused":  # in the MLP as well, where slices would be unpacked
        fixed["mlp_bytes"] = None
    if config.loss == "approximate":  # its subset is chosen by all labels of a batch
        fixed["micro_batches"] = 1
    return fixed
