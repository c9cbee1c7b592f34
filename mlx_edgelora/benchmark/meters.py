"""What a process has used since it began, whoever resets a counter in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.measure.meter import largest_resident_set, process_usage

# struct rusage_info_v4 of macOS's <sys/resource.h>: 16 bytes of uuid, then 64-bit counters, of
# which these are the 17th, 18th and 29th. A longer buffer than it fills.
_RUSAGE_INFO_V4, _WORDS = 4, 64
_DISK_READ, _DISK_WRITTEN, _LIFETIME_MAX_FOOTPRINT = 18, 19, 30


def peak_footprint() -> int:
    """The largest footprint of this process so far, in bytes.

    Linux: the largest resident set (since the counter was reset, if it was). macOS: the largest
    physical footprint. Elsewhere: `ru_maxrss`.
    """
    words = process_usage(_RUSAGE_INFO_V4, _WORDS)
    if words is not None:
        return words[_LIFETIME_MAX_FOOTPRINT]
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return largest_resident_set()


def disk_bytes() -> tuple[int, int] | None:
    """Bytes that this process has read and written, the system's cache included where it can be.

    Linux counts what was asked of the system, macOS what reached the disk; elsewhere None.
    """
    words = process_usage(_RUSAGE_INFO_V4, _WORDS)
    if words is not None:
        return words[_DISK_READ], words[_DISK_WRITTEN]
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    counts = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return counts["rchar"], counts["wchar"]


class WholePeak:
    """The peak of MLX's allocator since the process began; see `whole_peak`."""

    def __init__(self) -> None:
        self._before = 0
        self._reset = mx.reset_peak_memory

    def reset(self) -> None:
        """Begin a new peak, as MLX does, but remember the old one."""
        self._before = self.bytes
        self._reset()

    @property
    def bytes(self) -> int:
        """The largest of all."""
        return max(self._before, mx.get_peak_memory())


@contextmanager
def whole_peak() -> Iterator[WholePeak]:
    """Keep the peak over all resets that happen in between."""
    peak = WholePeak()
    original, mx.reset_peak_memory = mx.reset_peak_memory, peak.reset
    try:
        yield peak
    finally:
        mx.reset_peak_memory = original
