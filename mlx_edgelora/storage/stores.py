"""Stores that keep the inputs of blocks from forward to backward: in memory or in a mapped file.

A worker thread copies bytes between MLX's buffers and a `PageFile` while the computation continues.
Where MLX can wrap mapped memory (Metal, MLX 0.32.4), reading copies nothing.
"""

import copy
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure import units
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.storage.device_memory import MappedPart, device_memory, to_numpy
from mlx_edgelora.storage.page_file import PAGE, PageFile
from mlx_edgelora.storage.temporaries import create_unnamed

# Enough to see through a disk's own cache, little enough to take well under a second.
PROBE_BYTES = 8 * 10**6
# Entries of the longest array that MLX wraps: its shapes are 32-bit.
LARGEST = 2**31 - 1
# Errors of MLX if it cannot wrap memory, or if the backend has no such function.
REFUSALS = (AttributeError, TypeError, ValueError, RuntimeError)


class ActivationStore(Protocol):
    """Keeps one array per slot from `put` to `take`."""

    def reserve(self, slots: int, nbytes: int) -> None:
        """Allocate `slots` slots of `nbytes` bytes, and discard all arrays.

        More slots can be used later, and a slot grows if a larger array is put into it.
        """

    def put(self, slot: int, array: mx.array) -> None:
        """Store an evaluated array."""

    def prefetch(self, slot: int) -> None:
        """Start reading an array."""

    def take(self, slot: int, keep: bool = False) -> mx.array:
        """Return an array, and discard it unless `keep` is set."""

    def forget(self, slot: int) -> None:
        """Discard the array of a slot, if there is one."""

    def close(self) -> None:
        """Free all memory and files."""


class RamStore:
    """Keeps the arrays in memory. Memory: all of them."""

    def __init__(self) -> None:
        self._arrays: dict[int, mx.array] = {}

    def reserve(self, slots: int, nbytes: int) -> None:
        """Forget what is there."""
        self._arrays.clear()

    def put(self, slot: int, array: mx.array) -> None:
        """Keep a copy that shares the buffer, which a later `array += 1` does not change."""
        self._arrays[slot] = copy.copy(array)

    def prefetch(self, slot: int) -> None:
        """Read nothing: the array is in memory."""

    def take(self, slot: int, keep: bool = False) -> mx.array:
        """Return the array."""
        return self._arrays[slot] if keep else self._arrays.pop(slot)

    def forget(self, slot: int) -> None:
        """Discard the array."""
        self._arrays.pop(slot, None)

    def close(self) -> None:
        """Forget what is there."""
        self._arrays.clear()


@dataclass(frozen=True)
class _Kept:
    shape: tuple[int, ...]
    dtype: mx.Dtype
    nbytes: int


class MappedStore:
    """Keeps the arrays in one unlinked file. Memory: one array being written, one being read.

    Args:
        folder: folder of the file, which must be on a disk, or no memory is saved.
        meter: counts the bytes written and read.
        at_once: whether the file is created now, and not before something is stored.

    Raises:
        EdgeLoraError: the folder cannot be written, or its volume is full.
    """

    def __init__(
        self, folder: str | os.PathLike, meter: DiskMeter | None = None, at_once: bool = True
    ) -> None:
        self._meter, self._folder = meter or DiskMeter(), folder
        if at_once:
            self._file.reserve(0)
        self._slots, self._slot_bytes = 0, 0
        # Slots that were not reserved, or not large enough, are after all others: start, size.
        self._moved: dict[int, tuple[int, int]] = {}
        self._stop = 0
        self._kept: dict[int, _Kept] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mlx_edgelora-spill")
        self._writing: Future | None = None
        self._reading: dict[int, tuple[mx.array, Future]] = {}
        self._wraps = True  # until MLX refuses a length
        self._tried: set[int] = set()

    @cached_property
    def _file(self) -> PageFile:
        return PageFile(self._folder, "activations", "--activations ram")

    def reserve(self, slots: int, nbytes: int) -> None:
        """Grow the file to `slots` slots of `nbytes` bytes, and discard all arrays."""
        self._settle()
        self._kept.clear()
        self._moved.clear()
        self._slots, self._slot_bytes = slots, _pages(nbytes)
        self._stop = slots * self._slot_bytes
        self._file.reserve(self._stop)
        if self._wraps and nbytes not in self._tried:
            self._tried.add(nbytes)
            self._wraps = _can_wrap(self._file.pages[: self._slot_bytes], nbytes)

    def put(self, slot: int, array: mx.array) -> None:
        """Write an evaluated array to its slot, in the background."""
        self._wait_for_write()
        if array.nbytes > self._place(slot)[1]:
            self._move(slot, array.nbytes)
        self._kept[slot] = _Kept(array.shape, array.dtype, array.nbytes)
        # The copy shares the buffer, so that a later `array += 1` does not write into it.
        source = to_numpy(copy.copy(array)).reshape(-1).view(np.uint8)
        self._writing = self._worker.submit(self._write, slot, source)

    def prefetch(self, slot: int) -> None:
        """Start reading a slot in the worker thread."""
        if slot in self._reading or self._wraps or slot not in self._kept:
            return
        kept = self._kept[slot]
        array = device_memory().empty(kept.shape, kept.dtype)
        target = to_numpy(array).reshape(-1).view(np.uint8)
        self._reading[slot] = (array, self._worker.submit(self._read, slot, target))

    def take(self, slot: int, keep: bool = False) -> mx.array:
        """Return the array of a slot, after waiting for its read."""
        self._wait_for_write()
        array = self._in_place(slot, self._kept[slot]) if self._wraps else None
        if array is None:
            self.prefetch(slot)
            array, reading = self._reading.pop(slot)
            reading.result()
        if not keep:
            del self._kept[slot]
        return array

    def forget(self, slot: int) -> None:
        """Discard the array of a slot; its disk space stays allocated."""
        if slot in self._reading:
            _, reading = self._reading.pop(slot)
            reading.result()
        self._kept.pop(slot, None)

    def open(self, slot: int, nbytes: int) -> np.ndarray:
        """The memory of a slot, [nbytes] uint8, to be read and written in place.

        Its pages stay in memory until `touched` is called. What was in the slot is discarded.
        """
        self._settle()
        self._kept.pop(slot, None)
        if nbytes > self._place(slot)[1]:
            self._move(slot, nbytes)
        return self._region(slot, nbytes)

    def touched(self, slot: int, read: int = 0, written: int = 0) -> None:
        """Count bytes that were read and written in an open slot, and release its pages."""
        self._meter.add_read(read)
        self._meter.add_written(written)
        self._drop_pages(slot)

    def close(self) -> None:
        """Stop the worker and free the file's space."""
        try:
            self._settle()
        finally:
            self._worker.shutdown()
            if "_file" in vars(self):
                self._file.close()

    def _place(self, slot: int) -> tuple[int, int]:
        """The first byte of a slot, and its size."""
        reserved = self._slot_bytes if slot < self._slots else 0
        return self._moved.get(slot, (slot * self._slot_bytes, reserved))

    def _move(self, slot: int, nbytes: int) -> None:
        """Move a slot to the end of the file, for an array that is larger than reserved."""
        self._settle()
        self._moved[slot] = self._stop, _pages(nbytes)
        self._stop += _pages(nbytes)
        self._file.reserve(self._stop)

    def _in_place(self, slot: int, kept: _Kept) -> mx.array | None:
        """The array of a slot without a copy; None if MLX refuses, and then always."""
        start, size = self._place(slot)
        pages = self._file.pages[start : start + size]
        try:
            found = _wrap(pages, kept.dtype.size, kept.nbytes)
        except REFUSALS:
            self._wraps = False
            return None
        self._meter.add_read(kept.nbytes)
        return found.view(kept.dtype).reshape(kept.shape)

    def _region(self, slot: int, nbytes: int) -> np.ndarray:
        start, _ = self._place(slot)
        return self._file.pages[start : start + nbytes]

    def _write(self, slot: int, source: np.ndarray) -> None:
        target = self._region(slot, source.size)
        device_memory().save(memoryview(source), memoryview(target))
        self._meter.add_written(source.size)
        self._drop_pages(slot)

    def _read(self, slot: int, target: np.ndarray) -> None:
        part = MappedPart(self._region(slot, target.size), memoryview(target))
        device_memory().fill([part])
        self._meter.add_read(target.size)
        self._drop_pages(slot)

    def _drop_pages(self, slot: int) -> None:
        start, size = self._place(slot)
        self._file.drop(start, start + size)

    def _wait_for_write(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _settle(self) -> None:
        self._wait_for_write()
        for _, reading in self._reading.values():
            reading.result()
        self._reading.clear()


def _pages(nbytes: int) -> int:
    """Size in whole pages, at least one."""
    return max(PAGE, -(-nbytes // PAGE) * PAGE)


def spill_folder(candidates: Sequence[str | os.PathLike]) -> tuple[Path, str]:
    """Choose the fastest local disk among folders that exist or can be created.

    Folders that live in memory (tmpfs) are passed over: spilling there frees nothing.
    With more than one volume left, each is timed on writing and syncing 8 MB.

    Returns:
        The folder, and the reason for it.

    Raises:
        EdgeLoraError: no candidate is a writable folder on a disk.
    """
    volumes: dict[int, Path] = {}
    for candidate in map(Path, candidates):
        if _is_writable(candidate) and not _in_memory(candidate):
            volumes.setdefault(candidate.stat().st_dev, candidate)
    if not volumes:
        raise EdgeLoraError(
            f"spill_dir: none of {', '.join(map(str, candidates))} is a writable folder on a disk; "
            "name one with --spill-dir, or keep activations in memory with --activations ram"
        )
    if len(volumes) == 1:
        return next(iter(volumes.values())), "the only local disk found"
    seconds, best = min((_write_seconds(folder), folder) for folder in volumes.values())
    written = f"{units.size(PROBE_BYTES)} written in {seconds:.3f} s"
    return best, f"the fastest of {len(volumes)} volumes: {written}"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _in_memory(folder: Path) -> bool:
    """Whether a folder is in memory by Linux's table of mounts; False on other systems."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    kinds = {fields[1]: fields[2] for fields in map(str.split, mounts)}
    where = folder.resolve()
    mount = next((p for p in [where, *where.parents] if str(p) in kinds), None)
    return mount is not None and kinds[str(mount)] in ("tmpfs", "ramfs")


def _write_seconds(folder: Path) -> float:
    start = time.perf_counter()
    try:
        with create_unnamed(folder) as file:
            file.write(bytes(PROBE_BYTES))
            os.fsync(file.fileno())
            return time.perf_counter() - start
    except OSError:  # full disk: the last choice
        return math.inf


def _wrap(pages: np.ndarray, itemsize: int, nbytes: int) -> mx.array:
    """The first bytes of whole mapped pages as unsigned integers [n], without a copy.

    Metal wraps only whole pages, so all of them are wrapped, then sliced.

    Raises:
        ValueError: there are too many entries, or MLX refuses (others of `REFUSALS` as well).
    """
    entries = pages.view(f"u{itemsize}")
    if entries.size > LARGEST:
        raise ValueError(f"{entries.size} entries, MLX takes {LARGEST} at most")
    return mx.asarray(entries, copy=False)[: nbytes // itemsize]


def _can_wrap(pages: np.ndarray, nbytes: int) -> bool:
    """Whether MLX can use `nbytes` bytes of a slot in place, and computes with the right values.

    Metal can, from MLX 0.32.4 on. The slot's first and last bytes are overwritten.
    """
    itemsize = next(size for size in (4, 2, 1) if nbytes % size == 0)
    used = pages[:nbytes].view(f"u{itemsize}")
    ends = [slice(0, PAGE), slice(max(0, used.size - PAGE), used.size)]
    for number, end in enumerate(ends):
        used[end] = np.arange(used[end].size) + 7 * number
    try:
        array = _wrap(pages, itemsize, nbytes)
        found = mx.concatenate([array[end] for end in ends]) + 1
        return np.array_equal(np.array(found) - 1, np.concatenate([used[end] for end in ends]))
    except REFUSALS:
        return False
