"""Move bytes between files and arrays, where the device that computes wants them.

A Mac's GPU and a CPU read the memory that Python writes. MLX's CUDA build gives Python managed
memory, whose pages move to the host when Python touches them and back when the GPU does: 1.9 GB/s
on an H200. With `GpuMemory` they stay on the GPU: threads read into page-locked memory, from which
the GPU copies, with 12 GB/s.
"""

import ctypes
import os
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError

Arrays = dict[Hashable, mx.array]

# Bytes that a thread reads at a time, and the number of threads.
PIECE = 4 * 2**20
READERS = 4
# Arrays that share a buffer begin at multiples of it, as kernels may expect.
ALIGNMENT = 256
# Constants of CUDA's driver.
PORTABLE = 1
NON_BLOCKING = 1
PREFERRED_LOCATION = 3


@dataclass(frozen=True)
class Part:
    """Bytes of a file, and the memory that they are read into.

    Attributes:
        path: name of the file.
        descriptor: the open file.
        start: first byte.
        view: the memory; its size is the number of bytes.
    """

    path: Path
    descriptor: int
    start: int
    view: memoryview

    def read(self, at: int, view: memoryview) -> None:
        """Read the bytes from `at` on.

        Raises:
            EdgeLoraError: the file cannot be read, or is too short.
        """
        done = 0
        try:
            while done < view.nbytes:
                count = os.preadv(self.descriptor, [view[done:]], self.start + at + done)
                if not count:
                    raise EdgeLoraError(
                        f"{self.path}: ends too early; the file was changed while in use, start "
                        "again"
                    )
                done += count
        except OSError as error:
            raise unreadable(self.path, error) from error


@dataclass(frozen=True)
class MappedPart:
    """Bytes of a mapped file, and the memory that they are copied to.

    Attributes:
        pages: uint8 [n], the bytes.
        view: the memory; its size is the number of bytes.
    """

    pages: np.ndarray
    view: memoryview

    def read(self, at: int, view: memoryview) -> None:
        """Copy the bytes from `at` on."""
        view[:] = memoryview(self.pages)[at : at + view.nbytes]


class DeviceMemory(Protocol):
    """Moves bytes between files and the memory of evaluated arrays."""

    def empty(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Make an evaluated array that will be filled; it does not wait for computations."""

    def hold(self, view: memoryview) -> None:
        """Prepare memory that will be filled more than once."""

    def fill(self, parts: Sequence[Part | MappedPart]) -> None:
        """Read parts of files.

        Raises:
            EdgeLoraError: a file cannot be read, or is too short.
        """

    def save(self, source: memoryview, target: memoryview) -> None:
        """Copy the bytes of an array into mapped pages."""

    def load(self, places: Mapping[Hashable, tuple[np.ndarray, mx.Dtype]]) -> Arrays:
        """Copy mapped arrays: their pages, in a NumPy dtype of the same size, and their dtype."""

    def store(self, arrays: Sequence[tuple[mx.array, np.ndarray]]) -> None:
        """Copy evaluated arrays into mapped ones, of a NumPy dtype of the same size."""


class HostMemory:
    """Memory that the device and Python share. See `DeviceMemory`."""

    def empty(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Make an array of zeros."""
        array = mx.zeros(shape, dtype)
        mx.eval(array)
        return array

    def hold(self, view: memoryview) -> None:
        """Do nothing."""

    def fill(self, parts: Sequence[Part | MappedPart]) -> None:
        """Read one part after the other."""
        for part in parts:
            part.read(0, part.view)

    def save(self, source: memoryview, target: memoryview) -> None:
        """Copy bytes."""
        target[:] = source

    def load(self, places: Mapping[Hashable, tuple[np.ndarray, mx.Dtype]]) -> Arrays:
        """Copy one array after the other."""
        return {name: _copied(pages, dtype) for name, (pages, dtype) in places.items()}

    def store(self, arrays: Sequence[tuple[mx.array, np.ndarray]]) -> None:
        """Copy one array after the other."""
        for array, target in arrays:
            target[...] = to_numpy(array)


class GpuMemory:
    """Managed memory that stays on an NVIDIA GPU. See `DeviceMemory`.

    Memory: `READERS + 2` times `PIECE` bytes of page-locked memory on the host. `load` and `store`
    take the arrays once more on the GPU.

    Args:
        driver: CUDA's driver, libcuda.

    Raises:
        OSError: the driver refuses.
    """

    def __init__(self, driver: ctypes.CDLL) -> None:
        self._driver, self._of_thread = driver, threading.local()
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        # The context that MLX uses as well.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._own()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="mlx_edgelora-copy")

    def empty(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Make an array of zeros on a stream of this thread, apart from computations."""
        with self._apart():
            array = mx.zeros(shape, dtype)
            mx.eval(array)
        return array

    def hold(self, view: memoryview) -> None:
        """Let the pages of managed memory stay on the GPU."""
        if view.nbytes:
            _, _, stream = self._own()
            place = ctypes.c_uint64(_address(view)), ctypes.c_size_t(view.nbytes)
            self._call("cuMemAdvise", *place, PREFERRED_LOCATION, self._device)
            self._call("cuMemPrefetchAsync", *place, self._device, stream)
            self._call("cuStreamSynchronize", stream)

    def fill(self, parts: Sequence[Part | MappedPart]) -> None:
        """Read all parts, in several threads."""
        groups = _groups(parts)
        if len(groups) == 1:
            self._copy(groups[0])
            return
        for _ in self._pool.map(self._copy, groups):
            pass

    def save(self, source: memoryview, target: memoryview) -> None:
        """Copy bytes through page-locked memory."""
        view, locked, stream = self._own()
        for at in range(0, source.nbytes, PIECE):
            size = min(PIECE, source.nbytes - at)
            self._transfer(locked.value, _address(source) + at, size, stream)
            target[at : at + size] = view[:size]

    def load(self, places: Mapping[Hashable, tuple[np.ndarray, mx.Dtype]]) -> Arrays:
        """Copy all arrays at once; they share one buffer."""
        stops = [0]
        for pages, _ in places.values():
            stops.append(stops[-1] + -(-pages.nbytes // ALIGNMENT) * ALIGNMENT)
        flat = self.empty((stops[-1],), mx.uint8)
        view = memoryview(to_numpy(flat)) if flat.size else memoryview(b"")
        found, parts = {}, []
        with self._apart():
            for start, (name, (pages, dtype)) in zip(stops, places.items(), strict=False):
                stop = start + pages.nbytes
                found[name] = flat[start:stop].view(dtype).reshape(pages.shape)
                parts.append(MappedPart(pages.reshape(-1).view(np.uint8), view[start:stop]))
            self.fill(parts)
            mx.eval(found)
        return found

    def store(self, arrays: Sequence[tuple[mx.array, np.ndarray]]) -> None:
        """Copy all arrays at once, as one."""
        flat = [array.reshape(-1).view(mx.uint8) for array, _ in arrays if array.size]
        if not flat:
            return
        whole = mx.concatenate(flat)
        mx.eval(whole)
        copied = np.empty(whole.size, np.uint8)
        self.save(memoryview(to_numpy(whole)), memoryview(copied))
        at = 0
        for _, target in arrays:
            bytes_ = copied[at : at + target.nbytes]
            target[...] = bytes_.view(target.dtype).reshape(target.shape)
            at += target.nbytes

    def _copy(self, group: "_Group") -> None:
        view, locked, stream = self._own()
        at = 0
        for part, start, size in group.pieces:
            part.read(start, view[at : at + size])
            at += size
        self._transfer(group.address, locked.value, group.size, stream)

    def _transfer(self, target: int, source: int, size: int, stream: ctypes.c_void_p) -> None:
        places = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self._call("cuMemcpyAsync", *places, ctypes.c_size_t(size), stream)
        self._call("cuStreamSynchronize", stream)

    def _apart(self) -> mx.StreamContext:
        """Let MLX use a stream of this thread, so that an evaluation waits for nothing else."""
        if not hasattr(self._of_thread, "apart"):
            self._of_thread.apart = mx.new_stream(mx.default_device())
        return mx.stream(self._of_thread.apart)

    def _own(self) -> tuple[memoryview, ctypes.c_void_p, ctypes.c_void_p]:
        """This thread's page-locked memory, its address, and this thread's stream."""
        if not hasattr(self._of_thread, "own"):
            locked, stream = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuCtxSetCurrent", self._context)
            self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
            self._call("cuMemHostAlloc", ctypes.byref(locked), ctypes.c_size_t(PIECE), PORTABLE)
            array = (ctypes.c_char * PIECE).from_address(locked.value)
            self._of_thread.own = memoryview(array).cast("B"), locked, stream
        return self._of_thread.own

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise OSError(f"{name} failed with status {status}")


@dataclass
class _Group:
    """Pieces of parts whose memory is consecutive, at most `PIECE` bytes: part, start, size.

    A copy must not reach from one allocation into the next, even if they are neighbours, so the
    memory of all parts is that of one object.
    """

    memory: object
    address: int
    pieces: list[tuple[Part | MappedPart, int, int]] = field(default_factory=list)
    size: int = 0


def _groups(parts: Iterable[Part | MappedPart]) -> list[_Group]:
    groups: list[_Group] = []
    for part in parts:
        memory, nbytes = part.view.obj, part.view.nbytes
        start = _address(part.view) if nbytes else 0
        for at in range(0, nbytes, PIECE):
            size, last = min(PIECE, nbytes - at), groups[-1] if groups else None
            follows = last and last.memory is memory and last.address + last.size == start + at
            if not follows or last.size + size > PIECE:
                last = _Group(memory, start + at)
                groups.append(last)
            last.pieces.append((part, at, size))
            last.size += size
    return groups


@lru_cache(maxsize=1)
def device_memory() -> DeviceMemory:
    """The memory of MLX's default device."""
    if mx.default_device() == mx.gpu and mx.cuda.is_available():
        try:
            memory = GpuMemory(ctypes.CDLL("libcuda.so.1"))
            if _is_right(memory):
                return memory
        except (OSError, AttributeError, RuntimeError, ValueError):
            pass
    return HostMemory()  # right with any driver, but slower


def _is_right(memory: GpuMemory) -> bool:
    """Whether arrays have the values that are copied to them, and the other way round."""
    pages, back = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    array = memory.load({0: (pages, mx.float32)})[0]
    memory.store([(array + 1, back)])
    return np.array_equal(back, pages + 1)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _copied(pages: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(pages)
    if array.dtype != dtype:  # bfloat16, which NumPy has no name for
        array = array.view(dtype)
        mx.eval(array)
    return array


def to_numpy(array: mx.array) -> np.ndarray:
    """View an evaluated array as a NumPy array without a copy; bfloat16 becomes uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=False)


def unreadable(path: Path, error: OSError) -> EdgeLoraError:
    """The error for a file that could be read before."""
    return EdgeLoraError(
        f"{path}: cannot be read any more ({error.strerror}); put the file back and start again"
    )
