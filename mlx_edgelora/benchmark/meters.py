"""Measure the memory and disk use of a process since its start, even if counters are reset."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.measure.meter import largest_resident_set, process_usage

# struct rusage_info_v4 in <sys/resource.h> of macOS: a uuid of 16 bytes, then 64-bit counters, of
# which these are the 17th, 18th and 29th. The buffer is longer than the struct.
_RUSAGE_INFO_V4, _WORDS = 4, 64
_DISK_READ, _DISK_WRITTEN, _LIFETIME_MAX_FOOTPRINT = 18, 19, 30


def peak_footprint() -> int:
    """Largest footprint of this process so far in bytes.

    On Linux this is the largest resident set since the start or the last reset of the counter. On
    macOS it is the largest physical footprint. On other systems it is `ru_maxrss`.
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
    """Bytes that this process has read and written; None if the system does not count them.

    Linux counts all reads and writes, including those served by the system's cache. macOS counts
    only those that reach the disk.
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
    """Peak of MLX's allocator over all resets; see `whole_peak`."""

    def __init__(self) -> None:
        self._before = 0
        self._reset = mx.reset_peak_memory

    def reset(self) -> None:
        """Reset MLX's peak, but keep the previous one."""
        self._before = self.bytes
        self._reset()

    @property
    def bytes(self) -> int:
        """The largest peak in bytes."""
        return max(self._before, mx.get_peak_memory())


@contextmanager
def whole_peak() -> Iterator[WholePeak]:
    """Measure the peak in this context, including before calls of `mx.reset_peak_memory`."""
    peak = WholePeak()
    original, mx.reset_peak_memory = mx.reset_peak_memory, peak.reset
    try:
        yield peak
    finally:
        mx.reset_peak_memory = original
