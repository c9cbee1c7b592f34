"""The vocabulary head of any model, found by what it does, and read by tiles.

The head is the one matrix outside the blocks whose number of rows is the number of
logits: bind fewer rows to it and the model returns as many logits. What surrounds it
(final norm, logit scaling, soft-capping) stays the model's own code. The same matrix
may be the token embedding, of which only the batch's rows are ever needed.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_edgelora.layers.linear import DequantizedEmbedding
from mlx_edgelora.losses.cross_entropy import Tile
from mlx_edgelora.memory.meter import DiskMeter
from mlx_edgelora.model.blocks import BlockList, bound
from mlx_edgelora.model.safetensors import RowReader
from mlx_edgelora.model.sources import cast

MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
# Parameters of such a module; the rows of each belong to one token.
ROW_NAMES = ("weight", "scales", "biases", "bias")


class Rows(Protocol):
    """Rows of a module's parameters, by parameter name."""

    def slice(self, start: int, stop: int) -> dict[str, mx.array]:
        """Rows `start` to `stop` of every parameter."""


class ResidentRows:
    """Rows of a module that is in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._arrays = {n: module[n] for n in ROW_NAMES if module.get(n) is not None}

    def slice(self, start: int, stop: int) -> dict[str, mx.array]:
        """Rows `start` to `stop` of every parameter, without a copy."""
        return {name: array[start:stop] for name, array in self._arrays.items()}


class StreamedRows:
    """Rows of a module that stays on disk."""

    def __init__(
        self, readers: Mapping[str, RowReader], dtype: mx.Dtype | None, meter: DiskMeter
    ) -> None:
        self._readers, self._dtype, self._meter = readers, dtype, meter

    def slice(self, start: int, stop: int) -> dict[str, mx.array]:
        """Read rows `start` to `stop` of every parameter."""
        return self._received({n: r.slice(start, stop) for n, r in self._readers.items()})

    def take(self, indices: np.ndarray) -> dict[str, mx.array]:
        """Read the rows named by `indices`, int [n]."""
        return self._received({n: r.take(indices) for n, r in self._readers.items()})

    def _received(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        self._meter.add_read(sum(array.nbytes for array in arrays.values()))
        if self._dtype is None:
            return arrays
        return {name: cast(array, self._dtype) for name, array in arrays.items()}


class _StreamedLookup:
    """Lookup of tokens in an embedding that stays on disk; only their rows are read."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map int tokens [...] to embeddings [..., dims]."""
        tokens, places = np.unique(np.array(x), return_inverse=True)
        rows = self._rows.take(tokens)
        table = rows["weight"]
        if "scales" in rows:
            table = mx.dequantize(
                *rows.values(), group_size=self.group_size, bits=self.bits, mode=self.mode
            )
        return table[mx.array(places.reshape(x.shape))]


class StreamedEmbedding(_StreamedLookup, nn.Embedding):
    """An embedding on disk."""


class StreamedQuantizedEmbedding(_StreamedLookup, DequantizedEmbedding):
    """A packed embedding on disk; bound to a tile of its rows, it is a head for that tile."""


def stream_embedding(module: nn.Module, rows: StreamedRows) -> None:
    """Turn an embedding in place into one that reads its rows from disk."""
    packed = isinstance(module, nn.QuantizedEmbedding)
    object.__setattr__(module, "_rows", rows)
    kind = StreamedQuantizedEmbedding if packed else StreamedEmbedding
    object.__setattr__(module, "__class__", kind)


class Head:
    """The head of a model, as tiles of its vocabulary.

    Args:
        blocks: the blocks of the model.
        module: the head.
        rows: its parameters.
    """

    def __init__(self, blocks: BlockList, module: nn.Module, rows: Rows) -> None:
        self._blocks, self._module, self._rows = blocks, module, rows
        self.vocabulary, packed = module["weight"].shape
        self.dims = packed * 32 // module.bits if hasattr(module, "bits") else packed

    def tiles(self, rows: int) -> Iterator[Tile]:
        """One pass over the vocabulary in tiles of `rows` rows."""
        for start in range(0, self.vocabulary, rows):
            yield self.tile(start, min(start + rows, self.vocabulary))

    def tile(self, start: int, stop: int) -> Tile:
        """Read rows `start` to `stop`; the tile lives as long as what is returned."""
        arrays = self._rows.slice(start, stop)
        return Tile(start, stop, lambda hidden: self._logits(hidden, arrays))

    def is_separable(self) -> bool:
        """Whether a logit depends on its own row alone, so that tiles are exact."""
        hidden = mx.random.normal((2, self.dims), key=mx.random.key(0))
        half = min(8, self.vocabulary // 2)
        whole = self.tile(0, 2 * half).project(hidden)
        parts = [self.tile(start, start + half).project(hidden) for start in (0, half)]
        return bool(mx.allclose(whole, mx.concatenate(parts, axis=-1), rtol=1e-2).item())

    def _logits(self, hidden: mx.array, arrays: Mapping[str, mx.array]) -> mx.array:
        slots = {name: (self._module, name) for name in arrays}
        with bound(slots, arrays), self._blocks.returning(hidden[None]):
            return self._blocks.model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]


def find_head(blocks: BlockList) -> nn.Module | None:
    """Find the module that makes logits of hidden states; None where no tile can be taken.

    Nothing is evaluated: only shapes are looked at.
    """
    hidden = mx.zeros((1, 2, _width(blocks)))
    for module in blocks.modules_outside():
        if not isinstance(module, MATRICES) or module["weight"].shape[0] <= 3:
            continue
        few = ResidentRows(module).slice(0, 3)
        with bound({name: (module, name) for name in few}, few):
            if _logit_count(blocks, hidden) == 3:
                return module
    return None


def _logit_count(blocks: BlockList, hidden: mx.array) -> int | None:
    try:
        with blocks.returning(hidden):
            return blocks.model(mx.zeros((1, 2), mx.int32)).shape[-1]
    except ValueError:  # something else has as many rows as the vocabulary: an adapter's
        return None


def _width(blocks: BlockList) -> int:
    seen: list[int] = []

    def look(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        seen.append(x.shape[-1])
        return x

    with blocks.intercepted(look):
        blocks.model(mx.zeros((1, 2), mx.int32))
    return seen[-1]
