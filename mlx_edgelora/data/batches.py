"""Padded batches in the order and shape of mlx-lm; padding is never labelled."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.data.dataset import Dataset
from mlx_edgelora.data.packing import mean_context, most_labels, most_shared, pack
from mlx_edgelora.data.spans import Labelled, count_labels, label_mask, spans_of
from mlx_edgelora.errors import EdgeLoraError

PAD_TO = 32  # inputs are padded to multiples of this, so that few shapes are compiled
# On a GPU, inputs longer than `LONG` are padded to multiples of `LONG_PAD_TO`, because a graph is
# compiled and kept for every length. On a CPU this would only add padding to compute.
LONG, LONG_PAD_TO = 512, 128

# The tokens of a row, and the positions of labelled tokens.
LabelledRow = tuple[Sequence[int], Labelled]


@dataclass(frozen=True, eq=False)
class Preferences:
    """What is known about the answers in a batch of preferences.

    Attributes:
        desirable: bool [B], whether each row is a chosen or desirable answer.
        together: 2 if rows 2 i and 2 i + 1 are the chosen and the rejected answer to a prompt; 1 if
            every row is judged alone.
        mismatched: rows judged alone need answers that belong to other prompts, as many; else None.
        chosen_labels: labelled tokens of chosen answers for each term of the loss, if these rows
            are a part of a batch; None to count them.
    """

    desirable: np.ndarray
    together: int
    mismatched: "Batch | None" = None
    chosen_labels: float | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of similar length, padded on the right with token 0.

    Attributes:
        tokens: int32 [B, T + 1].
        mask: bool [B, T], the labels to train on; never padding.
        indices: indices of the rows in the data set, for messages.
        starts: int32 [B, T], in a packed batch: for each input the position at which its row of
            the data set begins. None in a batch without packing.
        preferences: in a batch of preferences, which answers are preferred; else None.
    """

    tokens: np.ndarray
    mask: np.ndarray
    indices: tuple[int, ...]
    starts: np.ndarray | None = None
    preferences: Preferences | None = None

    @property
    def terms(self) -> int:
        """Number of terms of the mean loss: labelled tokens, or pairs or judged answers."""
        if self.preferences is None:
            return int(self.mask.sum())
        return len(self.mask) // self.preferences.together

    @property
    def chosen_labels(self) -> float:
        """Labelled tokens of chosen answers for each term of the loss of preferences."""
        known = self.preferences
        if known.chosen_labels is not None:
            return known.chosen_labels
        return float(self.mask[known.desirable].sum()) / self.terms

    @property
    def together(self) -> int:
        """Number of rows that are never divided: two in a batch of pairs."""
        return 1 if self.preferences is None else self.preferences.together

    def share(self, which: Sequence[int]) -> "Batch":
        """Some of the rows; of a batch of pairs, some of the pairs."""
        rows = np.arange(len(self.mask)).reshape(-1, self.together)[which].reshape(-1)
        preferences = self.preferences
        if preferences is not None:
            preferences = replace(
                preferences,
                desirable=preferences.desirable[rows],
                chosen_labels=self.chosen_labels,
            )
        starts = None if self.starts is None else self.starts[rows]
        tokens, mask = self.tokens[rows], self.mask[rows]
        return replace(self, tokens=tokens, mask=mask, starts=starts, preferences=preferences)

    def inputs(self) -> np.ndarray:
        """The model's inputs: int32 [B, T]."""
        return self.tokens[:, :-1]

    def labels(self) -> np.ndarray:
        """The tokens that follow the inputs: int32 [B, T]."""
        return self.tokens[:, 1:]


class Epoch(NamedTuple):
    """The batches of one epoch, in order.

    Attributes:
        rows: for each row of a batch, the indices of the rows of the data set packed into it.
        groups: for each batch, the indices of its entries of `rows`.
    """

    rows: Sequence[np.ndarray]
    groups: list[np.ndarray]


class Sizes(NamedTuple):
    """Largest sizes of the batches of a run.

    Attributes:
        rows: rows of a batch.
        tokens: inputs of a row, padding included.
        labels: labelled tokens of a batch.
        context: with packing, the length of a token's row in the data set, averaged over tokens;
            without packing, `tokens`.
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
    """Batches of rows of similar length in random order; each epoch contains every row once.

    Rows are sorted by length and grouped, and the groups are permuted anew in every epoch. If the
    number of rows is no multiple of `batch_size`, one group, drawn in every epoch, is smaller. If
    all groups are full, their order is that of mlx-lm after `np.random.seed(seed)`. numpy's global
    state does not change.

    Args:
        dataset: a `Dataset`, or any sequence of (tokens, offset of the first labelled token) or
            (tokens, labelled spans). Rows are truncated to `max_seq_length`.
        batch_size: rows per batch; pairs of rows or judged rows in a data set of preferences.
        max_seq_length: largest number of tokens per row; T + 1 does not exceed it.
        loop: repeat epochs without end instead of ending after one.
        seed: seed of the order; None for a random order.
        packing: pack several rows of the data set into rows of up to `max_seq_length` tokens
            (`data/packing.py`).

    Returns:
        An iterator of batches.

    Raises:
        EdgeLoraError: a row has no token to train on. Raised at the call, before the first batch.
    """
    lengths = _longest(_lengths(dataset, max_seq_length), _together(dataset))
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
    """The number of batches of `iterate_batches` in `epochs` epochs."""
    if not packing:
        return epochs * -(-(len(dataset) // _together(dataset)) // batch_size)
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
    """The share of padding in the tokens of the first epoch's batches, from 0 to 1."""
    lengths = _lengths(dataset, max_seq_length)
    every = int(lengths.sum())
    capacity = max_seq_length if packing else None
    lengths = _longest(lengths, _together(dataset))
    epoch = next(_epochs(lengths, batch_size, capacity, seed))
    sizes = _filled(lengths, epoch.rows, capacity)
    together = _together(dataset)
    widths = [
        together * len(group) * _width(int(sizes[group].max()), max_seq_length)
        for group in epoch.groups
    ]
    return 1 - every / sum(widths)


def largest_batch(
    datasets: Iterable[Sequence[LabelledRow]],
    batch_size: int,
    max_seq_length: int,
    packing: bool = False,
) -> Sizes:
    """Upper bounds of the sizes of all batches of `iterate_batches`; all 0 without data.

    The bounds may belong to different batches. With packing they are estimates that no batch
    exceeds.
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
    tokens = _width(int(lengths.max()), max_seq_length) - 1
    together = _together(dataset)
    if together > 1:
        lengths, counts = _longest(lengths, together), counts.reshape(-1, together)
        judged = dataset.judged_alone  # what answers other prompts is computed apart
        counts = counts.max(axis=1) if judged else counts.sum(axis=1)
        together = 1 if judged else together
    counts, size = counts[np.argsort(lengths, kind="stable")], min(batch_size, len(lengths))
    whole = len(lengths) // size * size
    # The smaller group may be anywhere, so full groups are counted from the start or the end.
    labels = max(
        int(part.reshape(-1, size).sum(axis=1).max())
        for part in (counts[:whole], counts[len(counts) - whole :])
    )
    return Sizes(together * size, tokens, labels, tokens)


def _together(dataset: Sequence) -> int:
    """Rows of a data set that go into a batch together: 2 in one of preferences."""
    return dataset.together if isinstance(dataset, Dataset) else 1


def _longest(lengths: np.ndarray, together: int) -> np.ndarray:
    """Tokens of the longest of the rows that belong together."""
    return lengths.reshape(-1, together).max(axis=1)


def padded(tokens: int) -> int:
    """The padded number of inputs of a batch whose longest row has `tokens` tokens."""
    step = LONG_PAD_TO if tokens > LONG and mx.default_device() == mx.gpu else PAD_TO
    return -(-tokens // step) * step


def _width(tokens: int, max_seq_length: int) -> int:
    """T + 1 of a batch whose longest row has `tokens` tokens."""
    return min(1 + padded(tokens), max_seq_length)


def _lengths(dataset: Sequence[LabelledRow], max_seq_length: int) -> np.ndarray:
    """Tokens of each truncated row, int64 [n]; raises if a row has no token to train on."""
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
    """Yield epochs without end; with a `capacity` in tokens, rows are packed."""
    random = np.random.RandomState(seed)
    rows: Sequence[np.ndarray] = np.arange(len(lengths))[:, None]
    while True:
        if capacity is not None:
            rows = pack(lengths, capacity, random)
        order = np.argsort(_filled(lengths, rows, capacity), kind="stable")
        groups = np.split(order, _cuts(len(rows), batch_size, random))
        yield Epoch(rows, [groups[number] for number in random.permutation(len(groups))])


def _filled(lengths: np.ndarray, rows: Sequence[np.ndarray], capacity: int | None) -> np.ndarray:
    """Number of tokens of each row of the batches, without padding."""
    return lengths if capacity is None else np.array([lengths[row].sum() for row in rows])


def _cuts(rows: int, batch_size: int, random: np.random.RandomState) -> np.ndarray:
    """Start of each group except the first, in the order of lengths."""
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
            chosen = [rows[row] for row in group]
            if _together(dataset) > 1:
                yield _make_preferences(dataset, np.concatenate(chosen), max_seq_length)
            else:
                yield _make_batch(dataset, chosen, max_seq_length, packing)


def _make_preferences(dataset: Dataset, examples: np.ndarray, max_seq_length: int) -> Batch:
    """Make a batch of pairs, or of judged rows and of rows that answer other prompts."""
    rows = 2 * examples
    if not dataset.judged_alone:
        rows = np.stack([rows, rows + 1], axis=1).reshape(-1)
    batch = _make_batch(dataset, rows[:, None], max_seq_length, False)
    mismatched = None
    if dataset.judged_alone:
        mismatched = _make_batch(dataset, (rows + 1)[:, None], max_seq_length, False)
    desirable = np.array([dataset.is_desirable(row) for row in rows.tolist()])
    together = 1 if dataset.judged_alone else 2
    return replace(batch, preferences=Preferences(desirable, together, mismatched))


def _make_batch(
    dataset: Sequence[LabelledRow],
    rows: Sequence[np.ndarray],
    max_seq_length: int,
    packing: bool,
) -> Batch:
    """Make a batch of rows that each contain one or more rows of the data set."""
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
        starts[i, begin:] = begin  # padding counts as a row of its own
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
