"""The process of one contender: takes a job on standard input, tells every step on standard output.

Both are lines of JSON: the job, then "go" for each step after the first; events back. What the
contender prints goes to standard error. Before anything of the job is loaded the process tells
what MLX's allocator holds, so that a process that is not fresh shows.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

# Float32 is what it says, on CUDA and on an M5 as well; MLX must know before its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx

from mlx_edgelora.benchmark import contenders  # noqa: F401 - imported before anything is counted
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.meters import WholePeak, disk_bytes, peak_footprint, whole_peak
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import footprint

# A step that leaves more than this share of its time to be computed later was not finished.
UNFINISHED = 0.05
# Less than so many seconds cannot be told from the call itself.
CALL = 0.005

# What a contender may fail with; anything else leaves a traceback and ends the process.
REPORTED = (EdgeLoraError, RuntimeError, MemoryError, ValueError, ImportError, OSError)


class ComparisonDone(Exception):
    """The comparison has what it needs."""


class StepTimer:
    """Called by a runner after each step: ends the step's time, tells it, and waits.

    Args:
        job: of this process.
        peak: of its allocator.
        send, receive: to and from the comparison.
    """

    def __init__(
        self,
        job: TrainingJob,
        peak: WholePeak,
        send: Callable[..., None],
        receive: Callable[[], str],
    ) -> None:
        self._job, self._peak, self._send, self._receive = job, peak, send, receive
        # What is left to compute takes CPU time on a CPU, however busy the machine is.
        self._clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
        self._step, self._disk = 0, disk_bytes()
        self._begin()

    def __call__(
        self,
        loss: float,
        trained: Mapping[str, mx.array] | None = None,
        disk: tuple[int, int] | None = None,
    ) -> None:
        """As `StepCallback`: whatever is not evaluated yet is evaluated within the step's time."""
        called = self._clock()
        lazy = not isinstance(loss, float)
        if lazy:
            loss = float(loss.item())
        if trained is not None:
            mx.eval(list(trained.values()))
        mx.synchronize()
        spent, late = time.perf_counter() - self._start, self._clock() - called
        unfinished = lazy or late > max(CALL, UNFINISHED * (self._clock() - self._worked))
        self._step += 1
        before, own = self._disk, disk is not None
        self._disk = disk if own else disk_bytes()
        if own and self._step == 1:
            before = (0, 0)
        moved = None
        if before is not None and self._disk is not None:
            moved = [now - then for now, then in zip(self._disk, before, strict=True)]
        if self._step == self._job.steps and trained is not None:
            mx.save_safetensors(str(self._job.adapters), dict(trained))
        self._send(
            "step",
            loss=loss,
            seconds=spent,
            unfinished=unfinished,
            moved=moved,
            **self.used(),
        )
        if not own:
            self._disk = disk_bytes()
        if self._receive() != "go":
            raise ComparisonDone
        self._begin()

    def _begin(self) -> None:
        self._start, self._worked = time.perf_counter(), self._clock()

    def used(self) -> dict[str, int]:
        """Memory so far, and what is held now; on CUDA the footprint has no part of it."""
        return {
            "peak": self._peak.bytes,
            "peak_footprint": peak_footprint(),
            "waiting": max(footprint(), mx.get_active_memory()),
        }


def work(channel: IO[str], orders: IO[str]) -> None:
    """Do the job that the first line of `orders` describes."""

    def send(event: str, **values: Any) -> None:
        channel.write(json.dumps({"event": event, **values}) + "\n")
        channel.flush()

    job = TrainingJob(**json.loads(orders.readline()))
    with whole_peak() as peak:
        try:
            module, _, name = job.runner.partition(":")
            run = getattr(importlib.import_module(module), name)
            held = mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory()
            send("start", held=held, footprint=footprint())
            turn = StepTimer(job, peak, send, lambda: orders.readline().strip())
            run(job, turn)
            send("done", **turn.used())
        except ComparisonDone:
            return
        except REPORTED as error:
            send("failed", reason=" ".join(str(error).split()) or type(error).__name__)


def main() -> None:
    """Keep the channel apart from whatever is printed."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work(channel, sys.stdin)


if __name__ == "__main__":
    main()
