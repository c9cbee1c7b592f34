"""Padded batches in mlx-lm's order and shape, with labels on real tokens only."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.data.dataset import Dataset
from mlx_edgelora.data.packing import mean_context, most_labels, most_shared, pack
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
        starts: int32 [B, T], where rows of the data set share a row: of each input the position
            at which its own row begins; None where each has a row to itself.
    """

    tokens: np.ndarray
    mask: np.ndarray
    indices: tuple[int, ...]
    starts: np.ndarray | None = None

    def inputs(self) -> np.ndarray:
        """What the model sees: int32 [B, T]."""
        return self.tokens[:, :-1]

    def labels(self) -> np.ndarray:
        """The token that follows each input: int32 [B, T]."""
        return self.tokens[:, 1:]


class Epoch(NamedTuple):
    """The batches of one epoch, in their order.

    Attributes:
        rows: of each row of a batch the rows of the data set that share it.
        groups: of each batch its rows.
    """

    rows: Sequence[np.ndarray]
    groups: list[np.ndarray]


class Sizes(NamedTuple):
    """What no batch of a run exceeds, and how the batches of its first epoch are filled.

    Attributes:
        rows: of a batch.
        tokens: inputs of a row, padding included.
        labels: of a batch.
        context: tokens of the row of the data set that a token is in, averaged over tokens, where
            rows are shared; else the inputs of a row.
    """

    rows: int
    tokens: int
    labels: int
    context: int


def iterate_batches(
    dataset: Sequence[LabelledRow],
    batch_size: int,
    max_seq_length: int,
    loop: bool = False,
    seed: int | None = None,
    packing: bool = False,
) -> Iterator[Batch]:
    """Batches of rows of about one length, in a random order; every row is in one of each epoch.

    Rows are sorted by length and grouped, and the groups are permuted anew in every epoch. Where
    the number of rows is no multiple of `batch_size`, one group is smaller; which one, counted
    from the shortest rows, is drawn in every epoch. The permutations of groups that are all full
    are those of mlx-lm after `np.random.seed(seed)`, without a change to numpy's global state.

    Args:
        dataset: a `Dataset`, or any sequence of (tokens, offset of the first labelled one) or
            (tokens, labelled spans). Rows are cut to the limit.
        batch_size: rows per batch.
        max_seq_length: limit of tokens per row; T + 1 is no larger.
        loop: go on forever instead of ending after one epoch.
        seed: of the order; None draws one.
        packing: whether rows of the data set share rows of `max_seq_length` tokens
            (`data/packing.py`).

    Raises:
        EdgeLoraError: a row without a token to train on; at the call, before the first batch.
    """
    lengths = _lengths(dataset, max_seq_length)
    epochs = _epochs(lengths, batch_size, max_seq_length if packing else None, seed)
    return _generate(dataset, epochs if loop else islice(epochs, 1), max_seq_length, packing)


def count_batches(
    dataset: Sequence[LabelledRow],
    batch_size: int,
    max_seq_length: int,
    epochs: int = 1,
    seed: int | None = None,
    packing: bool = False,
) -> int:
    """How many batches `iterate_batches` makes of so many epochs."""
    if not packing:
        return epochs * -(-len(dataset) // batch_size)
    lengths = _lengths(dataset, max_seq_length)
    found = _epochs(lengths, batch_size, max_seq_length, seed)
    return sum(len(epoch.groups) for epoch in islice(found, epochs))


def padding_share(
    dataset: Sequence[LabelledRow],
    batch_size: int,
    max_seq_length: int,
    seed: int | None = None,
    packing: bool = False,
) -> float:
    """Which part of the tokens of the first epoch's batches is padding."""
    lengths = _lengths(dataset, max_seq_length)
    capacity = max_seq_length if packing else None
    epoch = next(_epochs(lengths, batch_size, capacity, seed))
    sizes = _filled(lengths, epoch.rows, capacity)
    widths = [
        len(group) * _width(int(sizes[group].max()), max_seq_length) for group in epoch.groups
    ]
    return 1 - float(lengths.sum()) / sum(widths)


def largest_batch(
    datasets: Iterable[Sequence[LabelledRow]],
    batch_size: int,
    max_seq_length: int,
    packing: bool = False,
) -> Sizes:
    """What no batch of `iterate_batches` exceeds; all 0 without data.

    The largest of each may be of different batches, and what is packed of none.
    """
    found = [
        _sizes(dataset, batch_size, max_seq_length, packing) for dataset in datasets if len(dataset)
    ]
    return Sizes(*map(max, zip(*found, strict=True))) if found else Sizes(0, 0, 0, 0)


def _sizes(
    dataset: Sequence[LabelledRow], batch_size: int, max_seq_length: int, packing: bool
) -> Sizes:
    rows = [dataset[index] for index in range(len(dataset))]
    lengths = np.array([min(len(row), max_seq_length) for row, _ in rows], np.int64)
    counts = np.array(
        [
            count_labels(spans_of(labelled, n))
            for n, (_, labelled) in zip(lengths, rows, strict=True)
        ]
    )
    if packing:
        shared = min(batch_size, most_shared(lengths, max_seq_length))
        tokens = _width(min(int(lengths.sum()), max_seq_length), max_seq_length) - 1
        labels = most_labels(lengths, counts, shared * max_seq_length)
        return Sizes(shared, tokens, labels, mean_context(lengths))
    counts, size = counts[np.argsort(lengths, kind="stable")], min(batch_size, len(rows))
    whole = len(rows) // size * size
    # The smaller group is behind a full one, or before it.
    labels = max(
        int(part.reshape(-1, size).sum(axis=1).max())
        for part in (counts[:whole], counts[len(rows) - whole :])
    )
    tokens = _width(int(lengths.max()), max_seq_length) - 1
    return Sizes(size, tokens, labels, tokens)


def padded(tokens: int) -> int:
    """To how many tokens a batch is padded whose longest row has so many."""
    step = LONG_PAD_TO if tokens > LONG and mx.default_device() == mx.gpu else PAD_TO
    return -(-tokens // step) * step


def _width(tokens: int, max_seq_length: int) -> int:
    """T + 1 of a batch whose longest row has so many tokens."""
    return min(1 + padded(tokens), max_seq_length)


def _lengths(dataset: Sequence[LabelledRow], max_seq_length: int) -> np.ndarray:
    """Tokens of each row within the limit, int64 [n]; each has one to train on."""
    lengths = np.empty(len(dataset), np.int64)
    for index in range(len(dataset)):
        tokens, labelled = dataset[index]
        lengths[index] = min(len(tokens), max_seq_length)
        if not len(spans_of(labelled, int(lengths[index]))):
            raise EdgeLoraError(
                f"{_place(dataset, index)}: has no token to train on within max_seq_length "
                f"{max_seq_length}; leave it out or raise the limit"
            )
    return lengths


def _epochs(
    lengths: np.ndarray, batch_size: int, capacity: int | None, seed: int | None
) -> Iterator[Epoch]:
    """Epoch after epoch, without end; rows are shared if they have a capacity."""
    random = np.random.RandomState(seed)
    rows: Sequence[np.ndarray] = np.arange(len(lengths))[:, None]
    while True:
        if capacity is not None:
            rows = pack(lengths, capacity, random)
        order = np.argsort(_filled(lengths, rows, capacity), kind="stable")
        groups = np.split(order, _cuts(len(rows), batch_size, random))
        yield Epoch(rows, [groups[number] for number in random.permutation(len(groups))])


def _filled(lengths: np.ndarray, rows: Sequence[np.ndarray], capacity: int | None) -> np.ndarray:
    """Tokens of each row of a batch."""
    return lengths if capacity is None else np.array([lengths[row].sum() for row in rows])


def _cuts(rows: int, batch_size: int, random: np.random.RandomState) -> np.ndarray:
    """Where groups begin in the order of lengths, but for the first one."""
    starts, rest = np.arange(0, rows, batch_size), rows % batch_size
    if rest:
        smaller = random.randint(len(starts))
        starts[smaller + 1 :] -= batch_size - rest
    return starts[1:]


def _generate(
    dataset: Sequence[LabelledRow],
    epochs: Iterable[Epoch],
    max_seq_length: int,
    packing: bool,
) -> Iterator[Batch]:
    for rows, groups in epochs:
        for group in groups:
            yield _make_batch(dataset, [rows[row] for row in group], max_seq_length, packing)


def _make_batch(
    dataset: Sequence[LabelledRow],
    rows: Sequence[np.ndarray],
    max_seq_length: int,
    packing: bool,
) -> Batch:
    """A batch of rows that are each shared by one or more rows of the data set."""
    parts = [[dataset[index] for index in row.tolist()] for row in rows]
    sizes = [[min(len(tokens), max_seq_length) for tokens, _ in row] for row in parts]
    width = _width(max(map(sum, sizes)), max_seq_length)
    tokens, starts = np.zeros((2, len(rows), width), np.int32)
    spans = []
    for i, (row, lengths) in enumerate(zip(parts, sizes, strict=True)):
        own, begin = [], 0
        for (part, labelled), length in zip(row, lengths, strict=True):
            tokens[i, begin : begin + length] = part[:length]
            starts[i, begin:] = begin
            own.append(begin + spans_of(labelled, length))
            begin += length
        starts[i, begin:] = begin  # padding is by itself
        spans.append(np.concatenate(own))
    shares = packing and max(map(len, rows)) > 1
    return Batch(
        tokens,
        label_mask(spans, width),
        tuple(np.concatenate(rows).tolist()),
        starts[:, :-1] if shares else None,
    )


def _place(dataset: Sequence, index: int) -> str:
    return dataset.place(index) if isinstance(dataset, Dataset) else f"row {index}"
