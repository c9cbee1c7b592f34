"""Where a block's frozen weights come from: memory, or the checkpoint's own shards.

`StreamedWeights` reads a block's tensors again for every visit and forgets them after
it; `mx.load` parses the header and reads only what is evaluated, so a visit costs the
block's bytes and no more. While one block computes, the next one is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlx_edgelora.files import Unchanged
from mlx_edgelora.memory.meter import DiskMeter


@dataclass(frozen=True)
class TensorPlace:
    """Where a parameter lies on disk: a shard, and the tensor's name in it."""

    shard: Path
    name: str


class WeightSource(Protocol):
    """Gives a block its frozen weights for one visit."""

    def block(self, index: int, without: str = "") -> dict[str, mx.array]:
        """Arrays by their name inside the block; empty where the block already has them.

        Those of the child `without` may be left out.
        """

    def prefetch(self, index: int) -> None:
        """Begin to read a block that is needed next."""


class ResidentWeights:
    """The weights are in the model and stay there. Memory: all of them."""

    def block(self, index: int, without: str = "") -> dict[str, mx.array]:
        """Nothing to bind."""
        return {}

    def prefetch(self, index: int) -> None:
        """Nothing to read."""


class TogetherWeights:
    """What several sources have for a block, in one dictionary; the last one wins."""

    def __init__(self, *sources: WeightSource) -> None:
        self._sources = sources

    def block(self, index: int, without: str = "") -> dict[str, mx.array]:
        """The arrays of every source."""
        return {k: v for source in self._sources for k, v in source.block(index).items()}

    def prefetch(self, index: int) -> None:
        """Let every source begin to read."""
        for source in self._sources:
            source.prefetch(index)


class StreamedWeights:
    """Reads each block from its shards for each visit. Memory: two blocks, packed.

    Args:
        blocks: for every block, the place of each tensor by its name inside the block.
        dtype: floating tensors are cast to it on the way in; None leaves them.
        meter: counts the bytes read.
        files: watches the shards.
        streamed: so many first blocks; the others stay in memory once they were read. The
            lower ones wait longer between their two visits. None for all.
    """

    def __init__(
        self,
        blocks: list[Mapping[str, TensorPlace]],
        dtype: mx.Dtype | None,
        meter: DiskMeter,
        files: Unchanged,
        streamed: int | None = None,
    ) -> None:
        self._blocks, self._dtype, self._meter, self._files = blocks, dtype, meter, files
        self._held: dict[int, dict[str, mx.array]] = {}
        self.hold_from(len(blocks) if streamed is None else streamed)
        self._ahead: dict[int, dict[str, mx.array]] = {}

    def block(self, index: int, without: str = "") -> dict[str, mx.array]:
        """Give a block's tensors, to be read where they are used, or already on their way.

        What else is on its way is dropped: ask for a block first, then for the next one.
        Tensors of the child `without` are left out, and none are taken that were on their way.

        Raises:
            EdgeLoraError: a shard was removed or changed since training began.
        """
        arrays = self._ahead.pop(index, None)
        self._ahead.clear()  # a change of direction leaves a block nobody will ask for
        if index >= self._held_from:
            if index not in self._held:
                arrays = self._read(index)
                mx.eval(arrays)
                self._held[index] = arrays
            return dict(self._held[index])
        return self._read(index, without) if arrays is None or without else arrays

    def hold_from(self, index: int) -> None:
        """Keep this block and those above it in memory, from their next visit on, and no other."""
        self._held_from = index
        for lower in [held for held in self._held if held < index]:
            del self._held[lower]

    def prefetch(self, index: int) -> None:
        """Read a block's tensors while the current one computes."""
        if index not in self._ahead and index < self._held_from:
            self._ahead[index] = self._read(index)
            mx.async_eval(self._ahead[index])

    def _read(self, index: int, without: str = "") -> dict[str, mx.array]:
        places = {
            local: place
            for local, place in self._blocks[index].items()
            if not without or not local.startswith(f"{without}.")
        }
        shards = {shard: self._load(shard) for shard in {p.shard for p in places.values()}}
        arrays = {local: shards[place.shard][place.name] for local, place in places.items()}
        self._meter.add_read(sum(array.nbytes for array in arrays.values()))
        if self._dtype is not None:
            arrays = cast_all(arrays, self._dtype)
        return arrays

    def _load(self, shard: Path) -> dict[str, mx.array]:
        # A tensor read lazily from a file that was overwritten in place is silently wrong.
        self._files.check(shard)
        return mx.load(str(shard))


def cast_all(arrays: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Cast floating arrays to `dtype`, but scales and biases of packed weights to none larger.

    Packed weights are dequantized in the dtype of what they multiply, so wider scales would
    only take more memory.
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
