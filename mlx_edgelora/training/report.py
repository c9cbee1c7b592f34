"""Figures of a training run, measured once and then shown, logged and passed to callbacks."""

import time
from dataclasses import asdict, dataclass

from mlx_edgelora.losses.preferences import Figures
from mlx_edgelora.measure.meter import DiskMeter, footprint, peak_memory


@dataclass(frozen=True)
class Usage:
    """Memory, disk traffic and time of the process since the run began; bytes and seconds."""

    peak_memory_bytes: int
    footprint_bytes: int
    disk_read_bytes: int
    disk_write_bytes: int
    time: float


class UsageMeter:
    """Measures `Usage`; time and disk traffic count from the creation of the meter."""

    def __init__(self, disk: DiskMeter) -> None:
        self._disk = disk
        self._start = time.perf_counter()
        self._disk_start = disk.snapshot()

    def read(self) -> Usage:
        """The usage so far."""
        disk = self._disk.snapshot()
        return Usage(
            peak_memory_bytes=peak_memory(),
            footprint_bytes=footprint(),
            disk_read_bytes=disk.read_bytes - self._disk_start.read_bytes,
            disk_write_bytes=disk.written_bytes - self._disk_start.written_bytes,
            time=time.perf_counter() - self._start,
        )


@dataclass(frozen=True)
class LossReport:
    """One report of a training or validation loss.

    Attributes:
        kind: `train_loss` or `val_loss`, the key of `loss` in records.
        iteration: number of finished steps, counted as in mlx-lm's callbacks: a validation before
            step n reports n - 1.
        loss: mean over the labelled tokens of the window or of the validation batches; or over
            their pairs or judged answers.
        learning_rate: learning rate of the last optimizer update.
        trained_tokens: labelled tokens since the run began.
        tokens: labelled tokens of the window or validation.
        seconds: time of the window or validation.
        batches: number of batches of the window or validation.
        read_bytes: bytes read from disk in the window or validation.
        written_bytes: bytes written to disk in the window or validation.
        usage: totals of the process since the run began.
        grad_norm: global norm of the gradients of the last update, before clipping; None in a
            validation and before the first update.
        figures: of losses of preferences, sums over the answers; else None.
    """

    kind: str
    iteration: int
    loss: float
    learning_rate: float
    trained_tokens: int
    tokens: int
    seconds: float
    batches: int
    read_bytes: int
    written_bytes: int
    usage: Usage
    grad_norm: float | None = None
    figures: Figures | None = None

    @property
    def tokens_per_second(self) -> float:
        """Labelled tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def record(self) -> dict[str, int | float]:
        """The record for the run's log."""
        return {
            "iteration": self.iteration,
            self.kind: self.loss,
            **({} if self.figures is None else self.figures.record()),
            "learning_rate": self.learning_rate,
            **({} if self.grad_norm is None else {"grad_norm": self.grad_norm}),
            "tokens_per_second": self.tokens_per_second,
            "trained_tokens": self.trained_tokens,
            **asdict(self.usage),
        }

    def callback_info(self) -> dict[str, int | float]:
        """The record for callbacks, with all keys of mlx-lm."""
        if self.kind == "val_loss":
            return {**self.record(), "val_time": self.seconds}
        return {
            **self.record(),
            "iterations_per_second": self.batches / max(self.seconds, 1e-9),
            "peak_memory": self.usage.peak_memory_bytes / 1e9,
        }


class Window:
    """Sums losses over consecutive batches, weighting each batch by the terms of its mean."""

    def __init__(self, meter: UsageMeter) -> None:
        self._meter = meter
        self._start = meter.read()
        self._loss = 0.0
        self._terms = self._tokens = 0
        self._figures: Figures | None = None
        self._seconds = 0.0
        self._batches = 0

    def add(
        self,
        loss: float,
        tokens: int,
        seconds: float,
        terms: int | None = None,
        figures: Figures | None = None,
    ) -> None:
        """Add one batch.

        Args:
            loss: its mean loss.
            tokens: its labelled tokens.
            seconds: its time.
            terms: of what the loss is the mean (`Batch.terms`); by default of the tokens.
            figures: sums over the answers, for losses of preferences.
        """
        terms = tokens if terms is None else terms
        self._loss += loss * terms
        self._terms += terms
        self._tokens += tokens
        if figures is not None:
            self._figures = figures if self._figures is None else self._figures + figures
        self._seconds += seconds
        self._batches += 1

    def report(
        self,
        kind: str,
        iteration: int,
        learning_rate: float,
        trained_tokens: int,
        grad_norm: float | None = None,
    ) -> LossReport:
        """The report of the batches added so far, of which there must be at least one."""
        usage = self._meter.read()
        return LossReport(
            kind=kind,
            iteration=iteration,
            loss=self._loss / self._terms,
            learning_rate=learning_rate,
            trained_tokens=trained_tokens,
            tokens=self._tokens,
            seconds=self._seconds,
            batches=self._batches,
            read_bytes=usage.disk_read_bytes - self._start.disk_read_bytes,
            written_bytes=usage.disk_write_bytes - self._start.disk_write_bytes,
            usage=usage,
            grad_norm=grad_norm,
            figures=self._figures,
        )
