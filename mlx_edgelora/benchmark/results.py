"""The measurements of a contender, and checks whether they are valid."""

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
        seconds: time until the harness has evaluated all arrays of the step.
        loss: reported loss.
        read: bytes read; None if unknown.
        written: bytes written; None if unknown.
        unfinished: whether the contender reported the step before it was evaluated.
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
        name: name of the contender.
        budget: its memory budget; None without one.
        bare: footprint of its process after imports, before the model is loaded.
        held: active, cached and peak memory of MLX at the same moment.
        peak: peak of MLX's allocator over the whole run.
        footprint: largest footprint of the process.
        steps: all steps; the first is a warm-up.
        ratios: ratios of step times to those of mlx-lm in the same rounds.
        adapter_gap: distance of its trained adapters from mlx-lm's, relative to the distance that
            mlx-lm's adapters moved; None if unknown.
        faults: reasons why the result is not valid.
        absent: reason why there are no measurements, such as too little memory or an error.
        kernels: reason why times cannot be compared with mlx-lm's; None if they can.
        plan: plan of this package by the names of `Plan`; None for other contenders.
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
        """Median seconds of the steps after the first."""
        return statistics.median(self.timed)

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [step.loss for step in self.steps]

    def moved(self, name: str) -> float | None:
        """Median bytes `read` or `written` in a step after the first."""
        values = [getattr(step, name) for step in self.steps[1:]]
        return None if not values or None in values else statistics.median(values)


@dataclass(frozen=True)
class Tolerance:
    """The largest accepted differences from mlx-lm.

    Attributes:
        loss: largest difference of the loss of a step, relative to the loss or to 1 if the loss is
            smaller, because a loss is the difference of two larger numbers.
        adapters: largest `adapter_gap`. It is 1 for a contender that trains nothing or does not
            apply its gradients.
    """

    loss: float
    adapters: float


# Bytes that imports may leave in MLX's allocator: one or two scalars.
IMPORTED = 1024
# By dtype of the computation. mlx-lm's sum over a large vocabulary has an error of 7e-5 in float32
# (docs/loss.md). The tolerance of adapters is wide because the signs of small gradients move them.
TOLERANCES = {
    "float32": Tolerance(loss=2e-4, adapters=0.05),
    "bfloat16": Tolerance(loss=1e-2, adapters=0.3),
    "float16": Tolerance(loss=1e-2, adapters=0.3),
}


def tolerance_of(dtype: str) -> Tolerance:
    """The tolerance for a dtype; with TF32, float32 has the tolerance of float16.

    MLX uses TF32 on CUDA and on an M5. Contenders turn it off unless the user has set
    MLX_ENABLE_TF32.
    """
    exact = os.environ.get("MLX_ENABLE_TF32", "0") == "0" or mx.default_device() == mx.cpu
    return TOLERANCES[dtype if exact or dtype != "float32" else "float16"]


def find_faults(result: Result, reference: Result, tolerance: Tolerance) -> None:
    """Add the faults of a result to `result.faults`; a result without faults is valid."""
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
    """Largest relative change of the loss on a repeated batch, compared with its first step.

    None if no batch is repeated.
    """
    first: dict[tuple[int, ...], float] = {}
    changes = []
    for loss, batch in zip(losses, batches, strict=False):
        if batch in first:
            changes.append(abs(loss - first[batch]) / abs(first[batch]))
        first.setdefault(batch, loss)
    return max(changes, default=None)


def adapter_gap(own: Path, theirs: Path, start: Path) -> float | None:
    """Distance of two trained adapters, relative to the second one's distance from the start.

    None if the first is missing or has other arrays.
    """
    if not own.exists():
        return None
    one, other, before = (mx.load(str(path)) for path in (own, theirs, start))
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        return None
    apart = sum(((one[k] - other[k]).astype(mx.float32) ** 2).sum().item() for k in other)
    way = sum(((other[k] - before[k]).astype(mx.float32) ** 2).sum().item() for k in other)
    return (apart / way) ** 0.5 if way else float("inf")
