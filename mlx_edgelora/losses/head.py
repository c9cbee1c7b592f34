"""What a loss asks of a vocabulary head, and the plainest one: a matrix in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

Arrays = dict[str, mx.array]
# Token by token (hidden states) or entry by entry (logits).
Pointwise = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Tile:
    """Some rows of the head: logits are `logits_transform(x @ weight.T + bias) + offset`.

    Attributes:
        weight: float32 [m, dims].
        bias: float32 [m] or None.
        offset: for a row that stands for many tokens, the logarithm of their number.
    """

    weight: mx.array
    bias: mx.array | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Adapter:
    """What is trained of a head: its matrix is W + scale * up @ down.

    Attributes:
        down: [rank, dims], floating.
        up: [vocabulary, rank], floating.
        scale: of the product.
    """

    down: mx.array
    up: mx.array
    scale: float


class Head(Protocol):
    """The matrix that makes logits of hidden states, and what lies around it.

    Attributes:
        vocabulary: number of rows.
        dims: width of the rows.
        final_norm: hidden states [n, width] -> [n, dims] before the matrix (a final norm); None
            for nothing.
        logits_transform: products [n, m] -> logits [n, m] (scaling, soft-capping); None for none.
        adapter: what is trained of the matrix; None for nothing.
        tail: makes one more row, for tokens that this head leaves out, of the sum of all of
            its rows; None for nothing.
    """

    vocabulary: int
    dims: int
    final_norm: Pointwise | None
    logits_transform: Pointwise | None
    adapter: Adapter | None
    tail: Callable[[Tile], Tile] | None

    def slice(self, start: int, stop: int) -> Arrays:
        """Rows `start` to `stop` as they are kept, packed or on disk."""

    def take(self, indices: mx.array) -> Arrays:
        """The rows named by `indices`, int [m], as they are kept."""

    def unpack(self, rows: Arrays) -> Tile:
        """Make numbers of what `slice` or `take` gave, without the adapter."""


class MatrixHead:
    """A matrix in memory as a head, for a loss that is used alone.

    Args:
        weight: [vocabulary, dims], floating.
        bias: [vocabulary] or None.
        final_norm, logits_transform, adapter: see `Head`.
    """

    tail = None

    def __init__(
        self,
        weight: mx.array,
        bias: mx.array | None = None,
        *,
        final_norm: Pointwise | None = None,
        logits_transform: Pointwise | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.vocabulary, self.dims = weight.shape
        self.final_norm, self.logits_transform, self.adapter = final_norm, logits_transform, adapter
        self._arrays = {"weight": weight} | ({} if bias is None else {"bias": bias})

    def slice(self, start: int, stop: int) -> Arrays:
        """Rows `start` to `stop`, without a copy."""
        return {name: array[start:stop] for name, array in self._arrays.items()}

    def take(self, indices: mx.array) -> Arrays:
        """The rows named by `indices`, int [m]."""
        return {name: array[indices] for name, array in self._arrays.items()}

    def unpack(self, rows: Arrays) -> Tile:
        """Cast to float32."""
        bias = rows["bias"].astype(mx.float32) if "bias" in rows else None
        return Tile(rows["weight"].astype(mx.float32), bias)


def add_row_sum(total: Tile | None, tile: Tile) -> Tile:
    """Add the sum of a tile's rows to a tile of one row; None counts as zero."""
    weight = tile.weight.sum(axis=0, keepdims=True)
    bias = None if tile.bias is None else tile.bias.sum(axis=0, keepdims=True)
    if total is None:
        return Tile(weight, bias)
    return Tile(total.weight + weight, None if bias is None else total.bias + bias)
