"""What a checkup is made with: sizes, a folder, a clock; and errors that are findings."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_edgelora.errors import EdgeLoraError

Found = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults take about a minute.

    Attributes:
        seconds: after which nothing slow is begun.
        head_sizes, heads, tokens: of attention.
        dtypes: whose kernel rates are measured.
        disk_bytes: that are written, read and wrapped.
        shape, blocks: of the random model that makes steps, by its name in `benchmark.shapes`.
        rows, row_tokens: of its batch.
        steps: of each budget; the first one warms up.
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


@dataclass(frozen=True)
class Checkup:
    """One checkup.

    Attributes:
        folder: of scratch files.
        sizes: how much is measured.
        footprint: of the process at the start, in bytes.
        began: the clock then.
    """

    folder: Path
    sizes: Sizes
    footprint: int
    began: float = field(default_factory=time.monotonic)

    def check_time(self) -> None:
        """See that something slow may be begun.

        Raises:
            EdgeLoraError: the time is over.
        """
        if time.monotonic() - self.began > self.sizes.seconds:
            raise EdgeLoraError(
                f"skipped: the limit of {self.sizes.seconds:.0f} seconds was reached"
            )


def run_probe(function: Callable[..., Mapping[str, Any]], *arguments: Any) -> Found:
    """What a function finds, or its error in one line as "error"."""
    try:
        return dict(function(*arguments))
    except Exception as error:  # noqa: BLE001 - whatever fails on a machine is what is asked for
        text = " ".join(str(error).split())
        return {"error": text if isinstance(error, EdgeLoraError) else _named(error, text)}


def best_seconds(function: Callable[[], Any], rounds: int) -> float:
    """Of the fastest of some calls."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment has a value, and afterwards its own again."""
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
