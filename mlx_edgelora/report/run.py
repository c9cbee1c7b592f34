"""Read a run from its log, for a report.

A log has one JSON record per line. A record is a report of a loss (`iteration`, `train_loss` or
`val_loss`, figures) or has one key: `run`, `plan`, `step_memory`, `samples`, `test`, `answers` or
`end`. Logs of mlx-lm's callback reports as JSON are read too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_edgelora.errors import EdgeLoraError

# Largest number of points of a curve; the points of a longer log are merged.
MOST_POINTS = 512
EVENTS = ("run", "plan", "step_memory", "samples", "test", "answers", "end")
# Larger numbers are treated as damaged.
HUGE = 1e30


class Curve:
    """A figure over steps, of which at most `MOST_POINTS` points are kept.

    Args:
        highest: merge points to their highest value instead of their mean.
    """

    def __init__(self, highest: bool = False) -> None:
        self._highest = highest
        self._stride = 1
        self._merged: list[tuple[float, float]] = []
        self._waiting: list[tuple[float, float]] = []
        self.first = self.last = self.low = self.high = math.nan

    def add(self, step: float, value: float) -> None:
        """Append a point, whose step is not below the last one."""
        if not self:
            self.first = self.low = self.high = value
        self.last, self.low, self.high = value, min(self.low, value), max(self.high, value)
        self._waiting.append((step, value))
        if len(self._waiting) == self._stride:
            self._merged.append(self._merge(self._waiting))
            self._waiting = []
        if len(self._merged) == MOST_POINTS:
            pairs = zip(self._merged[::2], self._merged[1::2], strict=True)
            self._merged = [self._merge(pair) for pair in pairs]
            self._stride *= 2

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points, as (step, value) in order of steps."""
        return self._merged + ([self._merge(self._waiting)] if self._waiting else [])

    def __bool__(self) -> bool:
        return not math.isnan(self.last)

    def _merge(self, points: Iterable[tuple[float, float]]) -> tuple[float, float]:
        steps, values = zip(*points, strict=True)
        return steps[-1], max(values) if self._highest else math.fsum(values) / len(values)


@dataclass
class Run:
    """The last run of a log.

    Attributes:
        count: number of runs in the log, including this one.
        events: the last record of each kind in `EVENTS`, unchanged.
        train_loss: mean training loss by step.
        val_loss: mean validation loss by step.
        accuracy: of losses of preferences, share of right comparisons in training.
        val_accuracy: the same in validations.
        margin: of losses of preferences, reward margin in training.
        val_margin: the same in validations.
        speed: labelled tokens per second.
        peak: peak memory of MLX's allocator since the report before, in bytes.
        process: memory of the process, in bytes.
        step: step of the last report; -1 before one.
        tokens: labelled tokens from the start to the last report.
        seconds: seconds from the start to the last report; None if unknown.
        unread: number of lines of the log without a record.
    """

    count: int = 1
    events: dict[str, Any] = field(default_factory=dict)
    train_loss: Curve = field(default_factory=Curve)
    val_loss: Curve = field(default_factory=Curve)
    accuracy: Curve = field(default_factory=Curve)
    val_accuracy: Curve = field(default_factory=Curve)
    margin: Curve = field(default_factory=Curve)
    val_margin: Curve = field(default_factory=Curve)
    speed: Curve = field(default_factory=Curve)
    peak: Curve = field(default_factory=lambda: Curve(highest=True))
    process: Curve = field(default_factory=lambda: Curve(highest=True))
    step: float = -1
    tokens: float = 0
    seconds: float | None = None
    unread: int = 0

    def event(self, kind: str) -> Mapping[str, Any]:
        """The last record of a kind; empty if there is none."""
        found = self.events.get(kind)
        return found if isinstance(found, Mapping) else {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record of the log."""
        self.events |= {kind: record[kind] for kind in EVENTS if kind in record}
        step = number(record.get("iteration"))
        if step is None:
            return
        self.step = step
        self.tokens = number(record.get("trained_tokens")) or self.tokens
        self.seconds = number(record.get("time")) or self.seconds
        peak = record.get("recent_peak_bytes", record.get("peak_memory_bytes"))
        if peak is None and number(record.get("peak_memory")) is not None:
            peak = record["peak_memory"] * 10**9  # mlx-lm reports GB
        figures = {
            "train_loss": record.get("train_loss"),
            "val_loss": record.get("val_loss"),
            "speed": record.get("tokens_per_second") if "train_loss" in record else None,
            "peak": peak,
            "process": record.get("footprint_bytes"),
        }
        before = "val_" if "val_loss" in record else ""
        figures |= {
            f"{before}accuracy": record.get("accuracy"),
            f"{before}margin": record.get("reward_margin"),
        }
        for name, value in figures.items():
            if (value := number(value)) is not None:
                getattr(self, name).add(step, value)

    @property
    def is_empty(self) -> bool:
        """Whether the run has no records."""
        return not (self.events or self.train_loss or self.val_loss)


def read_run(lines: Iterable[bytes], place: str) -> Run:
    """Read the last run of a log.

    Args:
        lines: lines of the log, read one at a time.
        place: name of the log in error messages.

    Raises:
        EdgeLoraError: no line is a record of a run.
    """
    run, unread, count = Run(), 0, 0
    for line in lines:
        count += 1
        record = _record(line)
        if record is None:
            unread += bool(line.strip())
            continue
        step = number(record.get("iteration"))
        if "run" in record or (step is not None and step < run.step):
            run = Run(run.count + (not run.is_empty))
        run.add(record)
    if run.is_empty:
        what = f"{count} lines without a record of a training run" if count else "an empty file"
        raise EdgeLoraError(f"{place}: {what}, expected the file that a run wrote with --log")
    run.unread = unread
    return run


def number(value: Any) -> float | None:
    """The value if it is a number that a chart can show; otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < HUGE else None  # also false for NaN


def _record(line: bytes) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    known = ("iteration", *EVENTS)
    return record if isinstance(record, dict) and not record.keys().isdisjoint(known) else None
