"""Padded batches in mlx-lm's order and shape, with labels on real tokens only."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_edgelora.data.dataset import Dataset
from mlx_edgelora.data.spans import Labelled, count_labels, label_mask, spans_of
from mlx_edgelora.errors import EdgeLoraError

PAD_TO = 32  # inputs are padded to multiples of it, so that few shapes are compiled
# On a GPU longer inputs are padded to multiples of this: a graph is built anew for every length,
# and kept. A CPU has nothing from it but padding to compute.
LONG, LONG_PAD_TO = 512, 128

# The tokens of a row, and which of them are labelled.
LabelledRow = tuple[Sequence[int], Labelled]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of about one length, padded on the right with token 0.

    Attributes:
        tokens: int32 [B, T + 1].
        mask: bool [B, T], which labels train: those of labelled spans, never padding.
        indices: the rows in the data set, for messages.
    """

    tokens: np.ndarray
    mask: np.ndarray
    indices: tuple[int, ...]

    def inputs(self) -> np.ndarray:
        """What the model sees: int32 [B, T]."""
        return self.tokens[:, :-1]

    def labels(self) -> np.ndarray:
        """The token that follows each input: int32 [B, T]."""
        return self.tokens[:, 1:]


def iterate_batches(
    dataset: Sequence[LabelledRow],
    batch_size: int,
    max_seq_length: int,
    loop: bool = False,
    seed: int | None = None,
) -> Iterator[Batch]:
    """Batches of rows of about one length, in a random order.

    Rows are sorted by length and grouped; an incomplete last group is left out, and the groups
    are permuted anew in every epoch. The permutations are those of mlx-lm after
    `np.random.seed(seed)`, without a change to numpy's global state.

    Args:
        dataset: a `Dataset`, or any sequence of (tokens, offset of the first labelled one) or
            (tokens, labelled spans). Rows are cut to the limit.
        batch_size: rows per batch.
        max_seq_length: limit of tokens per row; T + 1 is no larger.
        loop: go on forever instead of ending after one epoch.
        seed: of the order; None draws one.

    Raises:
        EdgeLoraError: fewer rows than `batch_size`, or a row without a token to train on; at
            the call, before the first batch.
    """
    lengths = np.empty(len(dataset), np.int32)
    for index in range(len(dataset)):
        tokens, labelled = dataset[index]
        lengths[index] = min(len(tokens), max_seq_length)
        if not len(spans_of(labelled, lengths[index])):
            raise EdgeLoraError(
                f"{_place(dataset, index)}: has no token to train on within max_seq_length "
                f"{max_seq_length}; leave it out or raise the limit"
            )
    check_batch_size(dataset, batch_size)
    order = np.argsort(lengths, kind="stable")
    groups = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return _generate(dataset, groups, max_seq_length, loop, np.random.RandomState(seed))


def largest_batch(
    datasets: Iterable[Sequence[LabelledRow]], batch_size: int, max_seq_length: int
) -> tuple[int, int]:
    """The most tokens of a row, padding included, and labels of a batch of `iterate_batches`.

    They may be of two batches. 0 and 0 without data.
    """
    tokens = labels = 0
    for dataset in datasets:
        rows = [dataset[index] for index in range(len(dataset))]
        lengths = np.array([min(len(row), max_seq_length) for row, _ in rows], np.int64)
        counts = np.array(
            [
                count_labels(spans_of(labelled, n))
                for n, (_, labelled) in zip(lengths, rows, strict=True)
            ]
        )
        order = np.argsort(lengths, kind="stable")[: len(rows) // batch_size * batch_size]
        if order.size:
            labels = max(labels, int(counts[order].reshape(-1, batch_size).sum(axis=1).max()))
            width = padded(int(lengths[order].max()))
            tokens = max(tokens, min(width, max_seq_length - 1))
    return tokens, labels


def padded(tokens: int) -> int:
    """To how many tokens a batch is padded whose longest row has so many."""
    step = LONG_PAD_TO if tokens > LONG and mx.default_device() == mx.gpu else PAD_TO
    return -(-tokens // step) * step


def check_batch_size(dataset: Sequence, batch_size: int) -> None:
    """Raise `EdgeLoraError` if a data set has too few rows for one batch."""
    if len(dataset) < batch_size:
        name = dataset.report.name if isinstance(dataset, Dataset) else "data set"
        raise EdgeLoraError(
            f"{name}: got {len(dataset)} usable rows, expected at least batch_size {batch_size}; "
            "lower it or add rows"
        )


def _generate(
    dataset: Sequence[LabelledRow],
    groups: np.ndarray,
    max_seq_length: int,
    loop: bool,
    random: np.random.RandomState,
) -> Iterator[Batch]:
    while True:
        for group in random.permutation(len(groups)):
            yield _make_batch(dataset, groups[group].tolist(), max_seq_length)
        if not loop:
            return


def _make_batch(dataset: Sequence[LabelledRow], indices: list[int], max_seq_length: int) -> Batch:
    rows = [dataset[index] for index in indices]
    lengths = [min(len(tokens), max_seq_length) for tokens, _ in rows]
    width = min(1 + padded(max(lengths)), max_seq_length)
    tokens = np.zeros((len(rows), width), np.int32)
    for i, ((row, _), length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[i, :length] = row[:length]
    spans = [spans_of(labelled, n) for n, (_, labelled) in zip(lengths, rows, strict=True)]
    return Batch(tokens, label_mask(spans, width), tuple(indices))


def _place(dataset: Sequence, index: int) -> str:
    return dataset.place(index) if isinstance(dataset, Dataset) else f"row {index}"
