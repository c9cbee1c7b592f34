"""Cross-entropy over the tokens that mean something near the labels (arXiv 2606.19528).

One subset of the vocabulary serves a whole batch: the union over its labels of each label's
k nearest tokens. The softmax runs over the subset alone. It misses what the other tokens
weigh, so the plain loss is biased low; the tail correction adds one more row to the head
for all of them, their mean row with the logarithm of their number as offset: by Jensen's
inequality their true mass is larger still, so some bias remains.

The subset is a head of its own over which the exact loss runs, tile by tile. So it needs no
memory for logits either, and it saves products: those with rows that are left out.

The mean row is a difference of two float32 sums over many rows. What that rounds weighs as
much as the same error in the logit of one of the tokens left out: nothing beside the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_edgelora.losses.exact import CrossEntropy, Gradients, check_labels
from mlx_edgelora.losses.head import Arrays, Head, Tile

# Distinct tokens, int [m] -> the k nearest of each, int [m, k], the nearest first.
Neighbours = Callable[[np.ndarray], np.ndarray]
# Labels whose neighbours are looked at together.
LABELS_AT_ONCE = 128


class SubsetHead:
    """Some rows of a head as a head of its own.

    Args:
        head: without an adapter.
        tokens: sorted int [m], the rows.
        total: the sum of all rows of the head, for a tail; None leaves the tail out.
    """

    adapter = None

    def __init__(self, head: Head, tokens: np.ndarray, total: Tile | None = None) -> None:
        self._head, self._tokens, self._total = head, mx.array(tokens), total
        self.vocabulary, self.dims = len(tokens), head.dims
        self.final_norm, self.logits_transform = head.final_norm, head.logits_transform
        self._left_out = head.vocabulary - len(tokens)
        self.tail = self._mean_row if total is not None and self._left_out else None

    def slice(self, start: int, stop: int) -> Arrays:
        """Gather rows `start` to `stop` of the subset."""
        return self._head.take(self._tokens[start:stop])

    def take(self, indices: mx.array) -> Arrays:
        """The rows named by `indices`, int [m], places in the subset."""
        return self._head.take(self._tokens[indices])

    def unpack(self, rows: Arrays) -> Tile:
        """As the head does."""
        return self._head.unpack(rows)

    def _mean_row(self, seen: Tile) -> Tile:
        weight = (self._total.weight - seen.weight) / self._left_out
        bias = None if seen.bias is None else (self._total.bias - seen.bias) / self._left_out
        return Tile(weight, bias, offset=math.log(self._left_out))


def choose_subset(
    labels: np.ndarray, neighbours: Neighbours, max_subset: int | None = None
) -> np.ndarray:
    """Union of the nearest tokens of some labels, with the labels themselves.

    Args:
        labels: int [n].
        neighbours: see `Neighbours`.
        max_subset: at most so many tokens: those that are near most labels of the batch, then
            those that are nearest to one, then those of smaller number. Labels are never
            left out, be they more than that.

    Returns:
        Sorted int [m].

    Memory: 16 bytes a token of the vocabulary, and the neighbours of `LABELS_AT_ONCE`.
    """
    tokens, counts = np.unique(labels, return_counts=True)
    frequency, rank = np.zeros(0), np.zeros(0, int)
    for start in range(0, len(tokens), LABELS_AT_ONCE):
        some = slice(start, start + LABELS_AT_ONCE)
        near = neighbours(tokens[some])
        k = near.shape[1]
        more = np.bincount(near.ravel(), np.repeat(counts[some], k))
        if (short := len(more) - len(frequency)) > 0:
            frequency = np.pad(frequency, (0, short))
            rank = np.pad(rank, (0, short), constant_values=k)
        frequency[: len(more)] += more
        if max_subset is not None:
            # Values of full size: NumPy 2.4 reads beyond ones that it has to broadcast.
            np.minimum.at(rank, near.ravel(), np.tile(np.arange(k), len(near)))
    names = np.flatnonzero(frequency)
    others = names[~np.isin(names, tokens)]
    if max_subset is not None and len(tokens) + len(others) > max_subset:
        # lexsort: the last key counts first.
        order = np.lexsort((others, rank[others], -frequency[others]))
        others = others[order[: max(0, max_subset - len(tokens))]]
    return np.union1d(tokens, others)


@dataclass(frozen=True)
class ApproximateCrossEntropy:
    """Mean cross-entropy over the tokens near the labels; see the module.

    Methods take and raise what those of `CrossEntropy` do, and `ValueError` for a head with
    an adapter, whose gradient the subset would not reach.

    Attributes:
        neighbours: see `Neighbours`.
        max_subset: see `choose_subset`.
        total: the sum of all rows of the head (`row_sum`), for the tail correction; None
            leaves it out.
        exact: the loss over the subset; its labels are not smoothed.

    Raises:
        ValueError: for a `max_subset` below 1, and for smoothed labels.
    """

    neighbours: Neighbours
    max_subset: int | None = None
    total: Tile | None = None
    exact: CrossEntropy = field(default_factory=CrossEntropy)

    def __post_init__(self) -> None:
        if self.max_subset is not None and self.max_subset < 1:
            raise ValueError(f"max_subset: got {self.max_subset}, expected at least 1, or None")
        if self.exact.label_smoothing:
            raise ValueError(
                f"label_smoothing: got {self.exact.label_smoothing}, expected 0: a target over "
                "the whole vocabulary needs the exact loss"
            )

    def __call__(self, hidden: mx.array, head: Head, labels: mx.array) -> tuple[mx.array, int]:
        """The loss as a part of a graph, differentiable in `hidden`."""
        return self.exact(hidden, *self.restrict(hidden, head, labels))

    def value(self, hidden: mx.array, head: Head, labels: mx.array) -> tuple[mx.array, int]:
        """The loss alone, evaluated tile by tile."""
        return self.exact.value(hidden, *self.restrict(hidden, head, labels))

    def value_and_grad(
        self, hidden: mx.array, head: Head, labels: mx.array
    ) -> tuple[tuple[mx.array, int], Gradients]:
        """The loss and its gradient, evaluated tile by tile."""
        return self.exact.value_and_grad(hidden, *self.restrict(hidden, head, labels))

    def restrict(
        self, hidden: mx.array, head: Head, labels: mx.array
    ) -> tuple[SubsetHead, mx.array]:
        """The subset of the head for these labels, and the labels' places in it."""
        check_labels(hidden, head, labels)
        if head.adapter is not None:
            raise ValueError(
                "approximate loss: got a head with an adapter, expected a frozen one; leave the "
                "head out of what is adapted, or use the exact loss"
            )
        numbers = np.array(labels)
        tokens = choose_subset(numbers, self.neighbours, self.max_subset)
        places = mx.array(np.searchsorted(tokens, numbers))
        return SubsetHead(head, tokens, self.total), places
