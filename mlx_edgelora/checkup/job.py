"""The settings of a checkup, its time limit, and probes whose errors are part of the report."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.fused import Backend
from mlx_edgelora.storage.files import user_cache

Found = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements; the defaults take about a minute.

    Attributes:
        seconds: time after which no slow measurement is started; see `default_sizes`.
        head_sizes: head sizes of the attention measurements.
        heads: number of heads of the attention measurements.
        tokens: number of tokens of the attention measurements.
        dtypes: dtypes whose rates are measured.
        disk_bytes: size of the file that is written, read and mapped.
        shape: name in `benchmark.shapes` of the random model for the training steps.
        blocks: number of blocks of this model.
        rows: rows of its batch.
        row_tokens: tokens of a row of its batch.
        steps: steps for each budget; the first one is a warm-up.
    """

    seconds: float = 90.0
    head_sizes: tuple[int, ...] = (64, 128, 256)
    heads: int = 8
    tokens: int = 2016
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    disk_bytes: int = 64 * 2**20
    shape: str = "medium"
    blocks: int = 4
    rows: int = 1
    row_tokens: int = 512
    steps: int = 3


# The same with CUDA. MLX compiles every kernel when it is first used: it took 200 seconds on 16
# cores to verify the gradients of the embedded model.
CUDA_SECONDS = 500.0


def default_sizes() -> Sizes:
    """The sizes of a checkup of this machine."""
    return Sizes(seconds=CUDA_SECONDS) if Backend.here().name == "cuda" else Sizes()


@dataclass(frozen=True)
class Checkup:
    """One checkup.

    Attributes:
        folder: folder of scratch files.
        sizes: sizes of the measurements.
        footprint: footprint of the process at the start, in bytes.
        cache: folder of the caches that are described.
        began: time of the start, by `time.monotonic`.
    """

    folder: Path
    sizes: Sizes
    footprint: int
    cache: Path = field(default_factory=user_cache)
    began: float = field(default_factory=time.monotonic)

    def check_time(self) -> None:
        """Check the time limit before a slow measurement.

        Raises:
            EdgeLoraError: the time limit was reached.
        """
        if time.monotonic() - self.began > self.sizes.seconds:
            raise EdgeLoraError(
                f"skipped: the limit of {self.sizes.seconds:.0f} seconds was reached"
            )


def run_probe(function: Callable[..., Mapping[str, Any]], *arguments: Any) -> Found:
    """The result of a function, or its error as one line under "error"."""
    try:
        return dict(function(*arguments))
    except Exception as error:  # noqa: BLE001 - any failure on a machine belongs in the report
        text = " ".join(str(error).split())
        return {"error": text if isinstance(error, EdgeLoraError) else _named(error, text)}


def best_seconds(function: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable; its previous value is restored on exit."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _named(error: Exception, text: str) -> str:
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
