"""Facts about tokenized data sets: lengths, labels, duplicates."""

import hashlib
from dataclasses import dataclass

import numpy as np

from mlx_edgelora.data import Dataset

# Rows of a histogram.
BINS = 8


@dataclass(frozen=True)
class Bin:
    """Rows of `first` to `last` tokens."""

    first: int
    last: int
    rows: int


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens of each row: int64 [n]."""
    return np.array([len(tokens) for tokens, _ in dataset], np.int64)


def histogram(lengths: np.ndarray) -> list[Bin]:
    """At most `BINS` bins of equal and round width, from the shortest to the longest row."""
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
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** (len(str(number)) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def duplicates(dataset: Dataset) -> int:
    """Rows that an earlier one equals, token by token and label by label."""
    return len(dataset) - len(set(_digests(dataset)))


def shared(dataset: Dataset, other: Dataset) -> int:
    """Rows of `other` whose tokens are those of a row of `dataset`."""
    known = set(_digests(dataset))
    return sum(digest in known for digest in _digests(other))


def _digests(dataset: Dataset) -> list[bytes]:
    return [
        hashlib.blake2b(tokens.tobytes() + b"|" + spans.tobytes(), digest_size=16).digest()
        for tokens, spans in dataset
    ]


def labelled_share(dataset: Dataset) -> float:
    """The share of tokens that are labels."""
    report = dataset.report
    return report.labels / report.tokens if report.tokens else 0.0


@dataclass(frozen=True)
class Segment:
    """Some neighbouring tokens of a row, all labelled or none, as text."""

    text: str
    is_labelled: bool
    tokens: int


def segments(tokens: np.ndarray, spans: np.ndarray, tokenizer: object) -> list[Segment]:
    """A row as text, cut where labels begin and end."""
    found, at = [], 0
    for start, stop in [*spans.tolist(), (len(tokens), len(tokens))]:
        for first, last, is_labelled in ((at, start, False), (start, stop, True)):
            if first < last:
                text = tokenizer.decode(tokens[first:last].tolist())
                found.append(Segment(text, is_labelled, last - first))
        at = stop
    return found


def sampled(count: int, wanted: int) -> list[int]:
    """Numbers of some rows, spread evenly."""
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(min(wanted, count))})
