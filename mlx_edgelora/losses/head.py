"""The interface between a loss and a vocabulary head, and its simplest form: a matrix in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

Arrays = dict[str, mx.array]
# A function that acts on each token (hidden states) or each entry (logits) separately.
Pointwise = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Tile:
    """Some rows of the head: logits are `logits_transform(x @ weight.T + bias) + offset`.

    Attributes:
        weight: float32 [m, dims].
        bias: float32 [m] or None.
        offset: logarithm of the number of tokens that a row represents; 0 for one.
    """

    weight: mx.array
    bias: mx.array | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Adapter:
    """The adapter of a head, whose matrix is W + scale * up @ down.

    Attributes:
        down: [rank, dims], floating.
        up: [vocabulary, rank], floating.
        scale: factor of the product.
    """

    down: mx.array
    up: mx.array
    scale: float


class Head(Protocol):
    """The matrix from hidden states to logits, with the operations before and after it.

    Attributes:
        vocabulary: number of rows.
        dims: width of the rows.
        final_norm: the final norm before the matrix, hidden states [n, width] -> [n, dims]; None
            if there is none.
        logits_transform: scaling or soft-capping after the matrix, products [n, m] -> logits
            [n, m]; None if there is none.
        adapter: adapter of the matrix; None if it is frozen.
        tail: computes one more row, which represents all tokens that are not in this head, from
            the sum of its rows; None if there is none.
    """

    vocabulary: int
    dims: int
    final_norm: Pointwise | None
    logits_transform: Pointwise | None
    adapter: Adapter | None
    tail: Callable[[Tile], Tile] | None

    def slice(self, start: int, stop: int) -> Arrays:
        """Rows `start` to `stop` as they are stored, which may be packed."""

    def take(self, indices: mx.array) -> Arrays:
        """The rows with `indices`, int [m], as they are stored."""

    def unpack(self, rows: Arrays) -> Tile:
        """Convert the result of `slice` or `take` to float32, without the adapter."""


class MatrixHead:
    """A matrix in memory as a head, for using a loss without a model.

    Args:
        weight: [vocabulary, dims], floating.
        bias: [vocabulary] or None.
        final_norm: see `Head`.
        logits_transform: see `Head`.
        adapter: see `Head`.
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
        """The rows with `indices`, int [m]."""
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
