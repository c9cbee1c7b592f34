"""Approximate cross-entropy over the tokens nearest to the labels (arXiv 2606.19528).

A batch uses one subset of the vocabulary: the union over its labels of each label's k nearest
tokens. The softmax is computed over the subset only. It misses the probability of all other
tokens, so the loss without correction is biased low. The tail correction adds one row to the head
for all other tokens: their mean row, with the logarithm of their number as offset. By Jensen's
inequality their true mass is larger, so some bias remains.

The exact loss runs over the subset as over any head, tile by tile. It needs no memory for all
logits, and it saves the products with the other rows.

The mean row is a difference of two float32 sums over many rows. Its rounding error has the same
effect as that error in the logit of one other token, which is negligible.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_edgelora.losses.exact import CrossEntropy, Gradients, check_labels
from mlx_edgelora.losses.head import Arrays, Head, Tile

# Distinct tokens, int [m] -> the k nearest tokens of each, int [m, k], nearest first.
Neighbours = Callable[[np.ndarray], np.ndarray]
# Number of labels whose neighbours are processed together.
LABELS_AT_ONCE = 128


class SubsetHead:
    """A head made of some rows of another head.

    Args:
        head: a head without an adapter.
        tokens: sorted indices of the rows, int [m].
        total: sum of all rows of the head, for the tail correction; None for no correction.
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
        """Gather the rows with `indices` in the subset, int [m]."""
        return self._head.take(self._tokens[indices])

    def unpack(self, rows: Arrays) -> Tile:
        """Unpack rows as the head does."""
        return self._head.unpack(rows)

    def _mean_row(self, seen: Tile) -> Tile:
        weight = (self._total.weight - seen.weight) / self._left_out
        bias = None if seen.bias is None else (self._total.bias - seen.bias) / self._left_out
        return Tile(weight, bias, offset=math.log(self._left_out))


def choose_subset(
    labels: np.ndarray, neighbours: Neighbours, max_subset: int | None = None
) -> np.ndarray:
    """The union of the labels and their nearest tokens.

    Args:
        labels: int [n].
        neighbours: see `Neighbours`.
        max_subset: limit on the number of tokens. Tokens near most labels of the batch come first,
            then those nearest to any label, then those with lower indices. All labels are kept,
            even if there are more of them.

    Returns:
        Sorted int [m].

    Memory: 16 bytes for each token of the vocabulary, and the neighbours of `LABELS_AT_ONCE`
    labels.
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
            # Values of full size, because NumPy 2.4 reads past the end of broadcast values.
            np.minimum.at(rank, near.ravel(), np.tile(np.arange(k), len(near)))
    names = np.flatnonzero(frequency)
    others = names[~np.isin(names, tokens)]
    if max_subset is not None and len(tokens) + len(others) > max_subset:
        # The last key of lexsort is the primary one.
        order = np.lexsort((others, rank[others], -frequency[others]))
        others = others[order[: max(0, max_subset - len(tokens))]]
    return np.union1d(tokens, others)


@dataclass(frozen=True)
class ApproximateCrossEntropy:
    """Mean cross-entropy over the tokens near the labels; see the module.

    Arguments and errors of the methods are those of `CrossEntropy`. A head with an adapter is a
    `ValueError` as well, because the subset covers only a part of the adapter's gradient.

    Attributes:
        neighbours: see `Neighbours`.
        max_subset: see `choose_subset`.
        total: sum of all rows of the head (`row_sum`), for the tail correction; None for no
            correction.
        exact: the loss over the subset, without label smoothing.

    Raises:
        ValueError: `max_subset` is below 1, or labels are smoothed.
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
        """Compute the loss as part of a graph, differentiable in `hidden`."""
        return self.exact(hidden, *self.restrict(hidden, head, labels))

    def value(self, hidden: mx.array, head: Head, labels: mx.array) -> tuple[mx.array, int]:
        """Compute the loss without gradients, evaluated tile by tile."""
        return self.exact.value(hidden, *self.restrict(hidden, head, labels))

    def value_and_grad(
        self, hidden: mx.array, head: Head, labels: mx.array
    ) -> tuple[tuple[mx.array, int], Gradients]:
        """Compute the loss and its gradient, evaluated tile by tile."""
        return self.exact.value_and_grad(hidden, *self.restrict(hidden, head, labels))

    def restrict(
        self, hidden: mx.array, head: Head, labels: mx.array
    ) -> tuple[SubsetHead, mx.array]:
        """The subset of the head for these labels, and the indices of the labels in it."""
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
