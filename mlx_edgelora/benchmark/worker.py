"""The process of one contender, which reads a job from standard input and reports every step.

The job is a line of JSON, followed by a line "go" for each step after the first. Events are lines
of JSON on standard output. The contender's own output goes to standard error. Before the model is
loaded, the process reports the memory of MLX's allocator, which shows whether the process is fresh.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

# Turn off TF32 on CUDA and on an M5. MLX reads the variable before its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from mlx_edgelora.mlx_settings import PLAIN, unset_defaults

if PLAIN in sys.argv:
    unset_defaults()

import mlx.core as mx

from mlx_edgelora.benchmark import contenders  # noqa: F401 - imported before memory is measured
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.meters import WholePeak, disk_bytes, peak_footprint, whole_peak
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import footprint

# A step is unfinished if more than this share of its time is computed after it was reported.
UNFINISHED = 0.05
# Seconds that the call itself may take.
CALL = 0.005

# Errors of a contender that are reported; any other error ends the process with a traceback.
REPORTED = (EdgeLoraError, RuntimeError, MemoryError, ValueError, ImportError, OSError)


class ComparisonDone(Exception):
    """The comparison needs no further steps."""


class StepTimer:
    """Measures and reports each step, then waits; a runner calls it after each step.

    Args:
        job: job of this process.
        peak: peak of its allocator.
        send: sends an event to the comparison.
        receive: waits for a line from the comparison.
    """

    def __init__(
        self,
        job: TrainingJob,
        peak: WholePeak,
        send: Callable[..., None],
        receive: Callable[[], str],
    ) -> None:
        self._job, self._peak, self._send, self._receive = job, peak, send, receive
        # On a CPU, unfinished work is measured in CPU time, which does not depend on other load.
        self._clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
        self._step, self._disk = 0, disk_bytes()
        self._begin()

    def __call__(
        self,
        loss: float,
        trained: Mapping[str, mx.array] | None = None,
        disk: tuple[int, int] | None = None,
    ) -> None:
        """Report a step, as `StepCallback`; arrays are evaluated within the time of the step."""
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
        """Peaks so far and the memory held now; on CUDA, the footprint excludes GPU memory."""
        return {
            "peak": self._peak.bytes,
            "peak_footprint": peak_footprint(),
            "waiting": max(footprint(), mx.get_active_memory()),
        }


def work(channel: IO[str], orders: IO[str]) -> None:
    """Run the job in the first line of `orders` and send its events to `channel`."""

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
    """Run a job with standard output as the channel; other output goes to standard error."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work(channel, sys.stdin)


if __name__ == "__main__":
    main()
