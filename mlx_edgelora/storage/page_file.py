"""A scratch file mapped into memory: private, unlinked, with its disk space allocated in advance.

Its contents derive from the user's text, so only the owner can read it, and it is unlinked at once:
no name leads to it, and a crash leaves nothing behind. Pages that are not needed any more are
released with madvise. Linux removes them from the process at once. macOS keeps them until it needs
the memory; they count as cached files, not as the process's footprint.
"""

import errno
import fcntl
import math
import mmap
import os
import shutil
import struct
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure import units
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.storage.device_memory import device_memory
from mlx_edgelora.storage.safetensors import DTYPES, NAMES
from mlx_edgelora.storage.temporaries import create_unnamed

# 16 KiB on Apple silicon, 4 KiB elsewhere; Metal wraps only whole pages.
PAGE = mmap.PAGESIZE
# Size of a write where disk space can only be allocated by writing.
ZEROS_BYTES = 8 * 2**20
# Arrays begin at multiples of it; more than any dtype needs.
ALIGNMENT = 64
# macOS's <sys/fcntl.h>: the command that takes disk space for a file, which Python has no name
# for; "all of it or nothing"; counted from where the space of the file ends. Then the struct
# fstore: these two, offset, length, and what was taken.
F_PREALLOCATE, F_ALLOCATEALL, F_PEOFPOSMODE = 42, 4, 3
FSTORE = struct.Struct("=Iiqqq")

# (dtype, shape) of an array
Spec = tuple[mx.Dtype, tuple[int, ...]]


class PageFile:
    """An unlinked file of mode 0600 that grows, mapped as bytes.

    Args:
        folder: its folder, which must be on a disk, or no memory is saved.
        what: its contents, for messages.
        instead: the option that keeps these in memory, for messages.

    Raises:
        EdgeLoraError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, what: str, instead: str) -> None:
        self._folder, self._what, self._instead = Path(folder), what, instead
        try:
            self._file = create_unnamed(self._folder)
        except OSError as error:
            raise EdgeLoraError(
                f"{folder}: no scratch file can be created ({error.strerror}); choose a writable "
                f"folder with --spill-dir, or keep {what} in memory with {instead}"
            ) from error
        self.pages: np.ndarray | None = None
        self._map: np.memmap | None = None

    @property
    def closed(self) -> bool:
        """Whether the file was closed."""
        return self._file.closed

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def reserve(self, size: int) -> None:
        """Make the file at least `size` bytes long, with all of its disk space allocated.

        Each time that the file grows it is mapped again, for which macOS syncs the whole file.

        Raises:
            EdgeLoraError: the volume is full, or no file can be mapped there.
        """
        if size <= (0 if self.pages is None else self.pages.size):
            return
        try:
            _preallocate(self.fileno(), size)
        except OSError as error:
            raise self._disk_error(size, error) from error
        is_new = self.pages is None
        try:
            self._map = np.memmap(self._file, np.uint8, mode="r+", shape=(size,))
            self.pages = self._map.view(np.ndarray)  # slicing it takes a fifth of the time
            if is_new:
                self._try_mapping()
        except OSError as error:
            raise self._cannot_map(error.strerror) from error

    def drop(self, start: int, stop: int) -> None:
        """Release the pages between two bytes from memory; they stay in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._advise(mmap.MADV_DONTNEED, start, stop)

    def will_need(self, start: int, stop: int) -> None:
        """Let the system read the pages between two bytes in the background."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._advise(mmap.MADV_WILLNEED, start, stop)

    def close(self) -> None:
        """Free the file's space."""
        self.pages = self._map = None
        self._file.close()

    def _advise(self, advice: int, start: int, stop: int) -> None:
        # The mapping is shared, so no advice changes the bytes of a page.
        first = start // PAGE * PAGE
        self._map._mmap.madvise(advice, first, stop - first)

    def _try_mapping(self) -> None:
        """Check that writes to the mapping reach the file, which some volumes do not support."""
        count = min(PAGE, self.pages.size)
        sent = bytes(n % 251 for n in range(count))
        self.pages[:count] = np.frombuffer(sent, np.uint8)
        self._map._mmap.flush(0, count)
        if os.pread(self.fileno(), count, 0) != sent:
            raise self._cannot_map("what is written to memory does not reach the file")
        self.pages[:count] = 0

    def _cannot_map(self, reason: str) -> EdgeLoraError:
        return EdgeLoraError(
            f"{self._folder}: a file in this folder cannot be mapped into memory ({reason}); "
            f"choose another folder with --spill-dir, or keep {self._what} in memory with "
            f"{self._instead}"
        )

    def _disk_error(self, size: int, error: OSError) -> EdgeLoraError:
        reason = error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"{units.size(shutil.disk_usage(self._folder).free)} are free"
        return EdgeLoraError(
            f"{self._folder}: spilling {self._what} needs {units.size(size)} there ({reason}); "
            f"free some space, choose another folder with --spill-dir, or use {self._instead}"
        )


@dataclass(frozen=True)
class _Place:
    start: int
    nbytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]


class Section:
    """Named arrays in consecutive pages of a `PageFile`.

    Args:
        file: the file, which must have at least `stop` bytes before a write.
        start: the first byte, a multiple of `PAGE`.
        specs: dtype and shape by name.
        meter: counts the bytes read and written.

    Attributes:
        stop: the byte after the last page.
    """

    def __init__(
        self, file: PageFile, start: int, specs: Mapping[Hashable, Spec], meter: DiskMeter
    ) -> None:
        self._file, self._start, self._meter = file, start, meter
        self._places: dict[Hashable, _Place] = {}
        self._views: dict[Hashable, np.ndarray] = {}
        self._viewed: np.ndarray | None = None  # the mapping that the views belong to
        at = start
        for name, (dtype, shape) in specs.items():
            nbytes = math.prod(shape) * dtype.size
            self._places[name] = _Place(at, nbytes, dtype, tuple(shape))
            at += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self.stop = -(-at // PAGE) * PAGE

    def specs(self) -> dict[Hashable, Spec]:
        """Dtype and shape by name."""
        return {name: (place.dtype, place.shape) for name, place in self._places.items()}

    def write(self, arrays: Mapping[Hashable, mx.array]) -> None:
        """Write evaluated arrays by name; other arrays stay as they are.

        Raises:
            ValueError: the dtype or shape of an array differs from its spec.
        """
        pairs = []
        for name, array in arrays.items():
            place = self._places[name]
            if (array.dtype, array.shape) != (place.dtype, place.shape):
                raise ValueError(
                    f"{name}: got {array.dtype} {array.shape}, expected {place.dtype} {place.shape}"
                )
            pairs.append((array, self._view(name)))
        device_memory().store(pairs)
        self._meter.add_written(sum(self._places[name].nbytes for name in arrays))
        self._drop()

    def read(self, names: Iterable[Hashable] | None = None) -> dict[Hashable, mx.array]:
        """Some arrays, by default all: evaluated copies. Memory: these."""
        wanted = self._places if names is None else names
        places = {name: (self._view(name), self._places[name].dtype) for name in wanted}
        arrays = device_memory().load(places)
        self._meter.add_read(sum(view.nbytes for view, _ in places.values()))
        self._drop()
        return arrays

    def read_one(self, name: Hashable) -> mx.array:
        """One array, an evaluated copy."""
        return self.read([name])[name]

    def prefetch(self) -> None:
        """Start reading the pages from the disk."""
        self._file.will_need(self._start, self.stop)

    def _view(self, name: Hashable) -> np.ndarray:
        """View of an array's bytes in the file, in a NumPy dtype of the same width."""
        if self._viewed is not self._file.pages:  # the file grew and was mapped again
            self._views.clear()
            self._viewed = self._file.pages
        if name not in self._views:
            place = self._places[name]
            flat = self._viewed[place.start : place.start + place.nbytes]
            self._views[name] = flat.view(DTYPES[NAMES[place.dtype]][1]).reshape(place.shape)
        return self._views[name]

    def _drop(self) -> None:
        if self.stop > self._start:
            self._file.drop(self._start, self.stop)


def _preallocate(descriptor: int, size: int) -> None:
    """Allocate the disk space now: a write to a hole on a full disk would be a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros, done = bytes(ZEROS_BYTES), os.fstat(descriptor).st_size
    if sys.platform == "darwin" and _preallocate_macos(descriptor, size - done):
        os.ftruncate(descriptor, size)
        return
    while done < size:
        done += os.pwrite(descriptor, zeros[: size - done], done)


def _preallocate_macos(descriptor: int, more: int) -> bool:
    """macOS: allocate `more` bytes after the end of a file; False if the volume cannot."""
    wanted = FSTORE.pack(F_ALLOCATEALL, F_PEOFPOSMODE, 0, more, 0)
    try:
        taken = FSTORE.unpack(fcntl.fcntl(descriptor, F_PREALLOCATE, wanted))[-1]
    except OSError:
        return False  # if writing fails as well, it reports the reason
    return taken >= more
