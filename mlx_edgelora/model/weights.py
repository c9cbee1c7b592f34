"""Sources of a block's frozen weights: memory, or the shards of the checkpoint."""

import fcntl
import os
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.storage.device_memory import Part, device_memory, to_numpy, unreadable
from mlx_edgelora.storage.files import WatchedFiles
from mlx_edgelora.storage.safetensors import DTYPES, TensorInfo

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class TensorLocation:
    """Location of a parameter on disk: the shard, and the tensor's name in it."""

    shard: Path
    name: str


class ResidentWeights:
    """Weights that stay in the model. Memory: all of them."""

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Return no arrays, because the model has them."""
        return {}

    def prefetch(self, index: int) -> None:
        """Read nothing."""

    def close(self) -> None:
        """Free nothing."""


class StreamedWeights:
    """Reads each block from its shards each time it is needed, into reused memory.

    Memory: the packed blocks in use, and the one that a worker thread reads. New memory for each
    block would cost more time than reading, because the system clears every page. The arrays of
    `block` are overwritten after `in_use` more calls, so everything computed from them must be
    evaluated before.

    Args:
        blocks: for every block, the shard and the location of each tensor by local name.
        dtype: dtype to cast floating tensors to; None leaves them.
        meter: counts the bytes read.
        files: watches the shards for changes.
        streamed: number of first blocks to stream; the others stay in memory once they are read.
            None for all. The first blocks have the longest time between forward and backward.
        file_cache: bytes of files that the system can cache; None if unknown. Larger blocks are
            read past the cache, where the system allows it.

    Attributes:
        in_use: number of the last returned blocks that are still being computed.
        repeats: whether a block that is asked for twice in a row is read once.
    """

    def __init__(
        self,
        blocks: list[Mapping[str, tuple[Path, TensorInfo]]],
        dtype: mx.Dtype | None,
        meter: DiskMeter,
        files: WatchedFiles,
        streamed: int | None = None,
        file_cache: int | None = None,
    ) -> None:
        self._blocks, self._dtype, self._meter, self._files = blocks, dtype, meter, files
        self._resident: dict[int, Arrays] = {}
        self._deferred: list[frozenset[str]] = [frozenset()] * len(blocks)
        self._resident_from = len(blocks) if streamed is None else streamed
        size = sum(i.stop - i.start for block in blocks[:streamed] for _, i in block.values())
        self._uncached = file_cache is not None and size > file_cache
        self._free: dict[Hashable, list[_Buffer]] = {}
        self._used: list[tuple[int, Hashable, _Buffer]] = []  # with the number of the call
        self._calls, self.in_use = 0, 1
        self.repeats = False
        self._last: tuple[int, _Buffer] | None = None
        self._ahead: tuple[int, Future] | None = None
        self._descriptors: dict[Path, int] = {}
        self._memory = device_memory()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mlx_edgelora-read")

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Return a block's tensors.

        A prefetch of another block is dropped, so call `prefetch` after this.

        Args:
            index: index of the block.
            own_memory: whether the arrays get memory that is never reused.

        Raises:
            EdgeLoraError: a shard was removed or changed since training began.
        """
        if self.repeats and self._last is not None and self._last[0] == index:
            return self._cast(self._last[1].arrays)
        ready, self._last = self._finish_prefetch(index), None
        self._release()
        if index in self._resident:
            return dict(self._resident[index])
        holds = index >= self._resident_from
        arrays = self._read_block(index, ready, own_memory or holds)
        if holds:
            self._resident[index] = dict(arrays)
        return arrays

    @property
    def resident_blocks(self) -> int:
        """Number of blocks that are kept in memory now."""
        return len(self._resident)

    def set_resident_from(self, index: int) -> None:
        """Keep this block and those above it in memory once they are read, and free the others."""
        self._resident_from = index
        for lower in [held for held in self._resident if held < index]:
            del self._resident[lower]
        self.trim()

    def defer(self, names: Sequence[Collection[str]]) -> None:
        """Leave tensors out of streamed blocks; they are read by `rows`.

        Args:
            names: for every block, their local names.
        """
        deferred = [frozenset(of_block) for of_block in names]
        if deferred != self._deferred:
            self.trim()
            self._deferred = deferred

    def start_rows(
        self, index: int, names: Sequence[str], rows: Sequence[int]
    ) -> Callable[[], Arrays] | None:
        """Read rows of tensors that were left out of a block in the background.

        They get memory of their own.

        Args:
            index: index of the block.
            names: local names of the tensors.
            rows: indices along their first axis.

        Returns:
            A function that waits for them and returns [len(rows), ...] by name, cast as blocks
            are; None if the block's arrays have them.

        Raises (also when that function is called):
            EdgeLoraError: a shard was removed or changed since training began.
        """
        if index >= self._resident_from or not self._deferred[index].issuperset(names):
            return None
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            shard, info = self._blocks[index][name]
            self._files.check(shard)
            size = (info.stop - info.start) // info.shape[0]
            shape = (len(rows), *info.shape[1:])
            tensors[name] = TensorInfo(info.dtype, shape, info.start, info.start + size * len(rows))
        buffer = _Buffer(tensors)

        def read() -> None:
            parts = []
            for name in names:
                shard, info = self._blocks[index][name]
                size = (info.stop - info.start) // info.shape[0]
                for first, stop in _runs(rows):
                    view = buffer.views[name][first * size : stop * size]
                    parts.append(self._part(shard, info.start + rows[first] * size, view))
            self._memory.fill(parts)

        reading = self._worker.submit(read)

        def finish() -> Arrays:
            reading.result()
            self._meter.add_read(buffer.nbytes)
            return self._cast(buffer.arrays)

        return finish

    def prefetch(self, index: int) -> None:
        """Read a block's tensors in the background."""
        if index >= self._resident_from or (self._ahead is not None and self._ahead[0] == index):
            return
        self._finish_prefetch(None)
        buffer = self._buffer(index)
        self._ahead = index, self._worker.submit(self._fill, index, buffer)

    def trim(self) -> None:
        """Free all buffers; arrays returned earlier must not be used any more."""
        self._finish_prefetch(None)
        self._last = None
        self._used.clear()
        self._free.clear()

    def close(self) -> None:
        """Free memory and close files."""
        self.trim()
        self._resident.clear()
        self._worker.shutdown()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _read_block(self, index: int, ready: "_Buffer | None", own_memory: bool) -> Arrays:
        if ready is None:
            ready = self._buffer(index)
            self._fill(index, ready)
        self._meter.add_read(ready.nbytes)
        arrays = self._cast(ready.arrays)
        if own_memory:
            mx.eval(arrays)
        else:
            self._used.append((self._calls, self._layout(index), ready))
            self._last = index, ready
        return arrays

    def _finish_prefetch(self, index: int | None) -> "_Buffer | None":
        """Wait for a prefetch, and return its buffer if it is that of this block."""
        if self._ahead is None:
            return None
        (ahead, future), self._ahead = self._ahead, None
        buffer = future.result()
        if ahead == index:
            return buffer
        self._free.setdefault(self._layout(ahead), []).append(buffer)
        return None

    def _release(self) -> None:
        """Free the buffers that were returned `in_use` calls ago."""
        self._calls += 1
        while self._used and self._calls - self._used[0][0] >= self.in_use:
            _, layout, buffer = self._used.pop(0)
            self._free.setdefault(layout, []).append(buffer)

    def _layout(self, index: int) -> Hashable:
        return tuple((n, i.dtype, i.shape) for n, (_, i) in self._tensors(index).items())

    def _tensors(self, index: int) -> Mapping[str, tuple[Path, TensorInfo]]:
        """The tensors that are read with a block."""
        if index >= self._resident_from or not self._deferred[index]:
            return self._blocks[index]
        left_out = self._deferred[index]
        return {n: place for n, place in self._blocks[index].items() if n not in left_out}

    def _buffer(self, index: int) -> "_Buffer":
        """A buffer for a block; free buffers of other layouts are dropped."""
        layout = self._layout(index)
        for other in [other for other in self._free if other != layout]:
            del self._free[other]
        free = self._free.setdefault(layout, [])
        return free.pop() if free else _Buffer({n: i for n, (_, i) in self._tensors(index).items()})

    def _cast(self, arrays: Arrays) -> Arrays:
        return dict(arrays) if self._dtype is None else cast_all(arrays, self._dtype)

    def _fill(self, index: int, buffer: "_Buffer") -> "_Buffer":
        for shard in dict.fromkeys(shard for shard, _ in self._tensors(index).values()):
            # A file that was overwritten in place would silently give wrong weights.
            self._files.check(shard)
        tensors = self._tensors(index).items()
        self._memory.fill([self._part(s, i.start, buffer.views[n]) for n, (s, i) in tensors])
        return buffer

    def _part(self, shard: Path, start: int, view: memoryview) -> Part:
        return Part(shard, self._descriptor(shard), start, view)

    def _descriptor(self, shard: Path) -> int:
        if shard not in self._descriptors:
            try:
                descriptor = os.open(shard, os.O_RDONLY)
            except OSError as error:
                raise unreadable(shard, error) from error
            self._descriptors[shard] = descriptor
            if self._uncached and hasattr(fcntl, "F_NOCACHE"):  # macOS
                fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return self._descriptors[shard]


class _Buffer:
    """Evaluated arrays of a block, and writable views of their bytes.

    MLX never reuses their memory, because this object holds a reference to them.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.arrays = {n: mx.zeros(i.shape, DTYPES[i.dtype][0]) for n, i in tensors.items()}
        mx.eval(self.arrays)
        self.views = {
            name: memoryview(to_numpy(array)).cast("B") if array.size else memoryview(b"")
            for name, array in self.arrays.items()
        }
        for view in self.views.values():
            device_memory().hold(view)
        self.nbytes = sum(array.nbytes for array in self.arrays.values())


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The places of rows that follow one another: first and stop of each run."""
    starts = [place for place, row in enumerate(rows) if not place or row != rows[place - 1] + 1]
    return zip(starts, [*starts[1:], len(rows)], strict=True)


def cast_all(arrays: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Cast floating arrays to `dtype`, except scales and biases of packed weights to a wider one.

    Packed weights are dequantized in the dtype of the activations, so wider scales would only take
    more memory.
    """
    packed = {name.removesuffix("scales") for name in arrays if name.endswith("scales")}
    kept = {
        name
        for name, array in arrays.items()
        if name.removesuffix("scales").removesuffix("biases") in packed
        and name.endswith(("scales", "biases"))
        and array.dtype.size < dtype.size
    }
    return {n: a if n in kept else cast(a, dtype) for n, a in arrays.items()}


def cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast floating arrays to `dtype`; packed weights and indices stay as they are."""
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
