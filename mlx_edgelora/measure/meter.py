"""What a run costs: allocator peak, process footprint, bytes read and written.

MLX's peak counts what its allocator handed out; the footprint is what the operating
system charges the process with, the interpreter and the mapped pages included. Both
are needed: a saving that only moves memory out of the allocator is none.
"""

import ctypes
import os
import resource
import sys
import threading
from dataclasses import dataclass

import mlx.core as mx

# struct rusage_info_v0 of macOS's <sys/resource.h>: 16 bytes of uuid, then 64-bit
# counters of which ri_phys_footprint is the eighth.
_RUSAGE_INFO_V0 = 0
_RUSAGE_INFO_V0_WORDS = 12
_PHYS_FOOTPRINT_WORD = 9


def footprint() -> int:
    """Memory of this process in bytes, as its operating system counts it.

    macOS: the physical footprint (what Activity Monitor shows, Metal buffers
    included). Linux: the resident set. Elsewhere: the largest resident set so far.
    """
    for measure in (_phys_footprint, _resident_set):
        size = measure()
        if size is not None:
            return size
    return largest_resident_set()


def largest_resident_set() -> int:
    """The most resident bytes of this process so far, by POSIX."""
    # The unit is left open: macOS counts bytes, everyone else KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_usage(flavor: int, words: int) -> ctypes.Array | None:
    """macOS's `struct rusage_info_v<flavor>` of this process as 64-bit words; elsewhere None."""
    try:
        proc_pid_rusage = ctypes.CDLL(None).proc_pid_rusage
    except (AttributeError, OSError):
        return None
    found = (ctypes.c_uint64 * words)()
    return None if proc_pid_rusage(os.getpid(), flavor, ctypes.byref(found)) else found


def sysctl(name: str) -> int | None:
    """A whole number that macOS knows by this name; None if it does not, and elsewhere."""
    if sys.platform != "darwin":
        return None
    try:
        by_name = ctypes.CDLL(None).sysctlbyname
    except (AttributeError, OSError):
        return None
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    failed = by_name(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return None if failed else value.value


def memory_pressure() -> str | None:
    """How macOS calls its shortage of memory: "warning" or "critical"; None without one."""
    level = sysctl("kern.memorystatus_vm_pressure_level")
    return {2: "warning", 4: "critical"}.get(level)


def _phys_footprint() -> int | None:
    words = process_usage(_RUSAGE_INFO_V0, _RUSAGE_INFO_V0_WORDS)
    return None if words is None else words[_PHYS_FOOTPRINT_WORD]


def _resident_set() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * resource.getpagesize()


# The largest lap since `reset_peak`, and since `recent_peak`; MLX's own counter is as global.
_laps = [0, 0]


def peak_memory() -> int:
    """Largest number of bytes that MLX's allocator held since `reset_peak`."""
    return max(_laps[0], mx.get_peak_memory())


def reset_peak() -> None:
    """Start a new measurement of `peak_memory`."""
    _laps[:] = [0, 0]
    mx.reset_peak_memory()


def lap() -> int:
    """The peak since the last lap; a new lap begins. `peak_memory` goes on over all of them."""
    peak = mx.get_peak_memory()
    _laps[:] = [max(before, peak) for before in _laps]
    mx.reset_peak_memory()
    return peak


def recent_peak() -> int:
    """The peak since this was asked last, or since `reset_peak`; `peak_memory` goes on."""
    lap()
    peak, _laps[1] = _laps[1], 0
    return peak


def eval_without_run_ahead(*arrays: mx.array) -> None:
    """Evaluate without MLX allocating ahead of what it computes.

    Then each array of a chain can take the memory of the one before. MLX's wait is a busy
    spin, so this is for short work. On a GPU it is a plain evaluation: Metal frees nothing
    before a command buffer is done, and a limit would empty the cache of freed buffers.
    """
    if mx.default_device() == mx.gpu:
        mx.eval(*arrays)
        return
    before = mx.set_memory_limit(1)
    try:
        mx.eval(*arrays)
    finally:
        mx.set_memory_limit(before)


@dataclass(frozen=True)
class DiskCounts:
    """Bytes read from and written to disk since the meter was made."""

    read_bytes: int
    written_bytes: int


class DiskMeter:
    """Counts bytes read and written; worker threads may add to it at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = 0
        self._written = 0

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self.snapshot().read_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes written so far."""
        return self.snapshot().written_bytes

    def add_read(self, count: int) -> None:
        """Count `count` bytes as read."""
        with self._lock:
            self._read += count

    def add_written(self, count: int) -> None:
        """Count `count` bytes as written."""
        with self._lock:
            self._written += count

    def snapshot(self) -> DiskCounts:
        """Both counters at one moment."""
        with self._lock:
            return DiskCounts(self._read, self._written)
