"""What was measured of a contender, and whether it may be believed."""

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Step:
    """One step of a contender.

    Attributes:
        seconds: until the harness had evaluated everything.
        loss: as reported.
        read, written: bytes; None where the system does not tell.
        unfinished: whether it left work to the harness.
    """

    seconds: float
    loss: float
    read: int | None
    written: int | None
    unfinished: bool


@dataclass
class Result:
    """One row of a comparison; sizes in bytes, times in seconds.

    Attributes:
        name: of the contender.
        budget: its memory budget, if it has one.
        bare: footprint of its process with everything imported and nothing loaded.
        held: what MLX held then: active, cached, and at the peak so far.
        peak: of MLX's allocator over the whole run.
        footprint: the largest of the process.
        steps: all of them; the first warms up.
        ratios: times over those of mlx-lm's step of the same round.
        adapter_gap: distance of its trained adapters from mlx-lm's, over the way those went.
        faults: why it is not valid.
        absent: why it has no figures: not installed, too large, or it failed.
        kernels: why its times cannot be compared with mlx-lm's, if so.
        plan: what this package chose, by the names of `Plan`.
    """

    name: str
    budget: int | str | None = None
    bare: int = 0
    held: tuple[int, ...] = (0, 0, 0)
    peak: int = 0
    footprint: int = 0
    steps: list[Step] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    adapter_gap: float | None = None
    faults: list[str] = field(default_factory=list)
    absent: str | None = None
    kernels: str | None = None
    plan: dict[str, Any] | None = None

    @property
    def timed(self) -> list[float]:
        """Seconds of the steps after the first."""
        return [step.seconds for step in self.steps[1:]]

    @property
    def seconds(self) -> float:
        """The median of them."""
        return statistics.median(self.timed)

    @property
    def losses(self) -> list[float]:
        """Of every step."""
        return [step.loss for step in self.steps]

    def moved(self, name: str) -> float | None:
        """Median bytes `read` or `written` in a step after the first."""
        values = [getattr(step, name) for step in self.steps[1:]]
        return None if not values or None in values else statistics.median(values)


@dataclass(frozen=True)
class Tolerance:
    """How far a contender that computes the same may be from mlx-lm.

    Attributes:
        loss: largest difference of a step's loss, over the loss or, where that is less, over 1:
            it is the difference of two larger numbers.
        adapters: largest `adapter_gap`. A contender that trains nothing, or does not apply its
            gradients, has 1.
    """

    loss: float
    adapters: float


# What importing leaves in MLX's allocator: a scalar or two, in bytes.
IMPORTED = 1024
# By dtype of the computation. mlx-lm's own sum over a large vocabulary is 7e-5 off in float32
# (docs/loss.md). Adapters move by the signs of small gradients, hence the wide second bound.
TOLERANCES = {
    "float32": Tolerance(loss=2e-4, adapters=0.05),
    "bfloat16": Tolerance(loss=1e-2, adapters=0.3),
    "float16": Tolerance(loss=1e-2, adapters=0.3),
}


def tolerance_of(dtype: str) -> Tolerance:
    """Of a computation in a dtype; what is multiplied as TF32 is no more exact than float16.

    MLX does that on CUDA, and on Metal on an M5, but contenders are told not to, unless the user
    set MLX_ENABLE_TF32.
    """
    exact = os.environ.get("MLX_ENABLE_TF32", "0") == "0" or mx.default_device() == mx.cpu
    return TOLERANCES[dtype if exact or dtype != "float32" else "float16"]


def find_faults(result: Result, reference: Result, tolerance: Tolerance) -> None:
    """Write down what is wrong with a result; one that has no fault is believed."""
    faults = result.faults
    if max(result.held) > IMPORTED:
        faults.append(
            f"its process was not fresh: MLX held {result.held[0]} bytes, {result.held[1]} in its "
            f"cache and {result.held[2]} at the peak before the model was loaded"
        )
    late = [number for number, step in enumerate(result.steps, 1) if step.unfinished]
    if late:
        faults.append(f"it left work unevaluated when it reported step {late[0]}")
    for number, (own, theirs) in enumerate(zip(result.losses, reference.losses, strict=False), 1):
        allowed = tolerance.loss * max(1.0, abs(theirs))
        if not abs(own - theirs) <= allowed:
            faults.append(
                f"its loss drifts from mlx-lm's: {own:.6f} for {theirs:.6f} at step {number} "
                f"({allowed:.2g} more or less is allowed)"
            )
            break
    if result is reference:
        return
    gap = result.adapter_gap
    if gap is None:
        faults.append("it left no adapters to be compared")
    elif not gap <= tolerance.adapters:
        faults.append(
            f"its adapters are not mlx-lm's: their distance is {gap:.3f} of the way that mlx-lm's "
            f"went ({tolerance.adapters:g} is allowed, 1 means untrained)"
        )


def movement(losses: list[float], batches: list[tuple[int, ...]]) -> float | None:
    """The largest relative change of the loss of one batch between two of its steps.

    None where no batch came twice.
    """
    first: dict[tuple[int, ...], float] = {}
    changes = []
    for loss, batch in zip(losses, batches, strict=False):
        if batch in first:
            changes.append(abs(loss - first[batch]) / abs(first[batch]))
        first.setdefault(batch, loss)
    return max(changes, default=None)


def adapter_gap(own: Path, theirs: Path, start: Path) -> float | None:
    """Distance between two trained adapters, over the way the second went from the start.

    None where the first is missing or holds other arrays.
    """
    if not own.exists():
        return None
    one, other, before = (mx.load(str(path)) for path in (own, theirs, start))
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        return None
    apart = sum(((one[k] - other[k]).astype(mx.float32) ** 2).sum().item() for k in other)
    way = sum(((other[k] - before[k]).astype(mx.float32) ** 2).sum().item() for k in other)
    return (apart / way) ** 0.5 if way else float("inf")
