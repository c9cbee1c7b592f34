"""Measure a run: allocator peak, process footprint, bytes read and written.

MLX's peak counts the memory that its allocator handed out. The footprint is the memory that the
operating system counts for the process, including the interpreter and mapped pages. Both are
needed, because moving memory out of the allocator does not save any.
"""

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

# struct rusage_info_v0 in <sys/resource.h> of macOS: a uuid of 16 bytes, then 64-bit counters. The
# eighth counter is ri_phys_footprint.
_RUSAGE_INFO_V0 = 0
_RUSAGE_INFO_V0_WORDS = 12
_PHYS_FOOTPRINT_WORD = 9


def footprint() -> int:
    """Memory of this process in bytes, as the operating system counts it.

    On macOS this is the physical footprint, as in Activity Monitor, including Metal buffers. On
    Linux it is the resident set. On other systems it is the largest resident set so far.
    """
    for measure in (_phys_footprint, _resident_set):
        size = measure()
        if size is not None:
            return size
    return largest_resident_set()


def largest_resident_set() -> int:
    """Largest resident set of this process so far in bytes, by POSIX."""
    # POSIX does not define the unit: macOS counts bytes, other systems KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_usage(flavor: int, words: int) -> ctypes.Array | None:
    """The `struct rusage_info_v<flavor>` of this process as 64-bit words; None except on macOS."""
    try:
        proc_pid_rusage = ctypes.CDLL(None).proc_pid_rusage
    except (AttributeError, OSError):
        return None
    found = (ctypes.c_uint64 * words)()
    return None if proc_pid_rusage(os.getpid(), flavor, ctypes.byref(found)) else found


def sysctl(name: str) -> int | None:
    """A whole number from macOS's sysctl; None for an unknown name and on other systems."""
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
    """The memory pressure on macOS, "warning" or "critical"; None if normal or unknown."""
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


# The largest lap since `reset_peak` and since `recent_peak`; global, as MLX's own counter is.
_laps = [0, 0]


def peak_memory() -> int:
    """Peak of MLX's allocator in bytes since `reset_peak`."""
    return max(_laps[0], mx.get_peak_memory())


def reset_peak() -> None:
    """Start a new measurement of `peak_memory`."""
    _laps[:] = [0, 0]
    mx.reset_peak_memory()


def lap() -> int:
    """Peak in bytes since the last lap. Starts a new lap; `peak_memory` covers all laps."""
    peak = mx.get_peak_memory()
    _laps[:] = [max(before, peak) for before in _laps]
    mx.reset_peak_memory()
    return peak


def recent_peak() -> int:
    """Peak in bytes since the last call or `reset_peak`; does not affect `peak_memory`."""
    lap()
    peak, _laps[1] = _laps[1], 0
    return peak


def eval_without_run_ahead(*arrays: mx.array) -> None:
    """Evaluate arrays while MLX does not allocate ahead of the computation.

    Each array of a chain can then reuse the memory of the previous one. MLX waits in a busy loop,
    so this is for short work. On a GPU it is a plain evaluation: Metal frees no memory before a
    command buffer is done, and a memory limit would empty the cache of freed buffers.
    """
    if mx.default_device() == mx.gpu:
        mx.eval(*arrays)
        return
    with memory_limit(1):
        mx.eval(*arrays)


# Seconds after which an addition that waits for MLX's tasks waits for good.
_PATIENCE = 5.0
_lost_count = threading.Event()


def can_limit_memory() -> bool:
    """Whether MLX's memory limit can be used in this process; takes well below a millisecond.

    At its limit MLX waits until it counts no unfinished tasks. When a task fails, such as reading a
    file that was cut, while others are added, MLX 0.32 never takes one of these off its count, and
    would wait for good. This is found once, after five seconds; `memory_limit` does nothing then.
    """
    if not _lost_count.is_set():
        done, before = threading.Event(), mx.set_memory_limit(1)

        def end() -> None:
            if not done.wait(_PATIENCE):
                mx.set_memory_limit(before)

        watch = threading.Thread(target=end, daemon=True)
        watch.start()
        try:
            mx.eval(mx.zeros((1,)) + 1)
        finally:
            done.set()
            watch.join()
            if mx.set_memory_limit(before) != 1:
                _lost_count.set()
    return not _lost_count.is_set()


@contextmanager
def memory_limit(limit: int) -> Iterator[None]:
    """Lower MLX's memory limit to `limit` bytes, unless `can_limit_memory` found it unusable."""
    if _lost_count.is_set():
        yield
        return
    before = mx.set_memory_limit(limit)
    if before < limit:
        mx.set_memory_limit(before)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@dataclass(frozen=True)
class DiskCounts:
    """Bytes read from and written to disk since the meter was created."""

    read_bytes: int
    written_bytes: int


class DiskMeter:
    """Counts bytes read and written; safe to use from several threads."""

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
        """Both counters at the same moment."""
        with self._lock:
            return DiskCounts(self._read, self._written)
