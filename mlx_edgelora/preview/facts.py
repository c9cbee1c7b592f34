"""Statistics of tokenized data sets: lengths, labels and duplicates."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_edgelora.data import Dataset

# Largest number of bins of a histogram.
BINS = 8


@dataclass(frozen=True)
class Bin:
    """A bin of a histogram of lengths.

    Attributes:
        first: smallest number of tokens in the bin.
        last: largest number of tokens in the bin.
        rows: number of rows.
    """

    first: int
    last: int
    rows: int


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Number of tokens of each row: int64 [n]."""
    return np.array([len(dataset[index][0]) for index in _trained(dataset)], np.int64)


def title(dataset: Dataset, index: int) -> str:
    """Place of a row, and what is said of it in a data set of preferences."""
    judgement = dataset.judgement(index)
    return dataset.place(index) if judgement is None else f"{dataset.place(index)}, {judgement}"


def _trained(dataset: Dataset) -> list[int]:
    return [row for example in range(dataset.examples) for row in dataset.rows_of(example)]


def histogram(lengths: np.ndarray) -> list[Bin]:
    """A histogram with at most `BINS` bins of one round width.

    Args:
        lengths: tokens of each row, int [n]; at least one.
    """
    low, high = int(lengths.min()), int(lengths.max())
    width = _round_up(-(-(high - low + 1) // BINS))
    first = low // width * width
    edges = np.arange(first, high + width, width)
    counts, _ = np.histogram(lengths, np.append(edges, edges[-1] + width))
    found = [
        Bin(int(edge), int(edge) + width - 1, int(count))
        for edge, count in zip(edges, counts, strict=True)
    ]
    while found and found[-1].rows == 0:
        found.pop()
    return found


def _round_up(number: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below a number."""
    power = 10 ** (len(str(number)) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def duplicates(dataset: Dataset) -> int:
    """Number of rows that have the same tokens and labels as an earlier row."""
    return dataset.examples - len(set(_digests(dataset)))


def shared(dataset: Dataset, other: Dataset) -> int:
    """Number of rows of `other` that have the same tokens and labels as a row of `dataset`."""
    known = set(_digests(dataset))
    return sum(digest in known for digest in _digests(other))


def _digests(dataset: Dataset) -> list[bytes]:
    """One digest for each row, pair or judged answer."""
    return [
        hashlib.blake2b(b"||".join(_bytes_of(dataset, example)), digest_size=16).digest()
        for example in range(dataset.examples)
    ]


def _bytes_of(dataset: Dataset, example: int) -> Iterator[bytes]:
    for index in dataset.rows_of(example):
        tokens, spans = dataset[index]
        yield tokens.tobytes() + b"|" + spans.tobytes()
        yield (dataset.judgement(index) or "").encode()


def labelled_share(dataset: Dataset) -> float:
    """Share of tokens that are labels, from 0 to 1."""
    report = dataset.report
    return report.labels / report.tokens if report.tokens else 0.0


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a row, all labelled or all unlabelled, as text.

    Attributes:
        text: the decoded text.
        is_labelled: whether the tokens are labelled.
        tokens: number of tokens.
    """

    text: str
    is_labelled: bool
    tokens: int


def segments(tokens: np.ndarray, spans: np.ndarray, tokenizer: object) -> list[Segment]:
    """Decode a row in segments that begin and end with its labelled spans.

    Args:
        tokens: int32 [n], tokens of the row.
        spans: int32 [k, 2], labelled spans.
        tokenizer: the model's tokenizer.
    """
    found, at = [], 0
    for start, stop in [*spans.tolist(), (len(tokens), len(tokens))]:
        for first, last, is_labelled in ((at, start, False), (start, stop, True)):
            if first < last:
                text = tokenizer.decode(tokens[first:last].tolist())
                found.append(Segment(text, is_labelled, last - first))
        at = stop
    return found


def sampled(count: int, wanted: int) -> list[int]:
    """Evenly spaced indices of at most `wanted` of `count` rows."""
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(min(wanted, count))})
