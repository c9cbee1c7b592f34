"""Tokenized rows in compact memory: 4 bytes per token; texts are not kept."""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mlx_edgelora.data.findings import Findings
from mlx_edgelora.data.spans import Labelled, count_labels, spans_of
from mlx_edgelora.errors import EdgeLoraError

# Kinds of data sets of preferences.
PAIRS, JUDGED = "pairs", "judged"


class Row(NamedTuple):
    """One tokenized row and its source.

    Attributes:
        source: file or data set, with the word for its rows, such as `train.jsonl: line`.
        number: number of the row in its source, from 1.
        tokens: token ids of prompt and completion.
        labelled: position of the first token to train on (0 for all tokens), or (start, stop)
            pairs.
        is_desirable: in a data set of preferences, whether it is a chosen or desirable answer.
    """

    source: str
    number: int
    tokens: Sequence[int]
    labelled: Labelled
    is_desirable: bool = True


@dataclass(frozen=True)
class DataReport:
    """Statistics of the rows of a data set.

    Attributes:
        name: name of the data set.
        rows: number of rows read.
        truncated: number of rows truncated to `max_seq_length` tokens.
        longest: tokens of the longest row read.
        dropped: number of rows left out because they have no token to train on.
        max_seq_length: limit of a row, in tokens.
        tokens: tokens of all rows kept.
        labels: labelled tokens of all rows kept.
        labels_cut: labelled tokens lost by truncation.
        findings: remarks on the tokenization of rows.
    """

    name: str
    rows: int
    truncated: int
    longest: int
    dropped: int
    max_seq_length: int
    tokens: int = 0
    labels: int = 0
    labels_cut: int = 0
    findings: Findings = field(default_factory=Findings)

    def warning(self) -> str | None:
        """One sentence about truncated and dropped rows; None if there are none."""
        parts = []
        if self.truncated:
            cut = ""
            if self.labels_cut:
                share = 100 * self.labels_cut / (self.labels + self.labels_cut)
                cut = f", which cuts {share:.2g} % of the labels"
            parts.append(
                f"{self.truncated:,} longer than max_seq_length {self.max_seq_length} (up to "
                f"{self.longest:,} tokens) and truncated{cut}"
            )
        if self.dropped:
            parts.append(f"{self.dropped:,} without a token to train on and left out")
        return f"{self.name}: of {self.rows:,} rows, {' and '.join(parts)}" if parts else None


class Dataset(Sequence[tuple[np.ndarray, np.ndarray]]):
    """Truncated rows of (tokens int32 [n], labelled spans int32 [k, 2]) with k > 0.

    A span is the (start, stop) of labelled tokens; the first token of a row is in no span. Memory:
    4 bytes per token, 24 per row and 8 per span. Rows without a token to train on (a prompt as
    long as the limit, a single token) are left out, because the mean loss of a batch with only
    such rows would be 0 / 0.

    Args:
        rows: the rows, in order.
        max_seq_length: limit of a row, in tokens.
        name: name of the data set.
        findings: remarks on the tokenization of rows.
        preferences: None, or the kind of a data set of preferences, in which rows 2 i and 2 i + 1
            belong together: `PAIRS` of a chosen and a rejected answer, or an answer that is
            `JUDGED` alone and another one, to the same prompt, that belongs to another prompt.

    Attributes:
        report: statistics of the rows.
        together: rows that belong together: 2 in a data set of preferences, else 1.
        judged_alone: whether answers are judged alone.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        max_seq_length: int,
        name: str,
        findings: Findings | None = None,
        preferences: str | None = None,
    ) -> None:
        self.together = 1 if preferences is None else 2
        self.judged_alone = preferences == JUDGED
        self._desirable = array("b")
        self._tokens = array("i")
        self._starts = array("q", [0])
        self._spans = array("i")
        self._span_starts = array("q", [0])
        self._numbers = array("q")
        self._sources: list[tuple[int, str]] = []
        counts: Counter[str] = Counter()
        self._read(rows, max_seq_length, counts)
        self.report = DataReport(
            name,
            rows=counts["rows"],
            truncated=counts["truncated"],
            longest=counts["longest"],
            dropped=counts["rows"] - counts["kept"],
            max_seq_length=max_seq_length,
            tokens=len(self._tokens),
            labels=counts["labels"],
            labels_cut=counts["labels_cut"],
            findings=findings or Findings(),
        )
        if len(self) == 0:
            raise _nothing_to_train(self.report)

    def _read(self, rows: Iterable[Row], max_seq_length: int, counts: Counter[str]) -> None:
        """Keep rows with labels; consecutive pieces of one row are counted as one row."""
        place, is_kept, is_cut = None, False, False
        for row in self._complete(rows, max_seq_length):
            if (row.source, row.number) != place:
                place, is_kept, is_cut = (row.source, row.number), False, False
                counts["rows"] += 1
            length = len(row.tokens)
            counts["longest"] = max(counts["longest"], length)
            tokens = row.tokens[:max_seq_length]
            spans = spans_of(row.labelled, len(tokens))
            labels = count_labels(spans)
            counts["labels_cut"] += count_labels(spans_of(row.labelled, length)) - labels
            if not labels:
                continue
            counts["kept"] += not is_kept
            is_kept = True
            if len(tokens) < length:
                counts["truncated"] += not is_cut
                is_cut = True
            counts["labels"] += labels
            self._append(row, tokens, spans)

    def _complete(self, rows: Iterable[Row], max_seq_length: int) -> Iterator[Row]:
        """The rows; of rows that belong together none has labels if one has none."""
        for some in zip(*[iter(rows)] * self.together, strict=True):
            lengths = [min(len(row.tokens), max_seq_length) for row in some]
            if all(len(spans_of(r.labelled, n)) for r, n in zip(some, lengths, strict=True)):
                yield from some
            else:
                yield from (row._replace(labelled=[]) for row in some)

    def _append(self, row: Row, tokens: Sequence[int], spans: np.ndarray) -> None:
        if not self._sources or self._sources[-1][1] != row.source:
            self._sources.append((len(self), row.source))
        self._tokens.extend(tokens)
        self._starts.append(len(self._tokens))
        self._numbers.append(row.number)
        self._desirable.append(row.is_desirable)
        self._spans.extend(spans.reshape(-1).tolist())
        self._span_starts.append(len(self._spans) // 2)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def examples(self) -> int:
        """Number of rows of the source that are trained: rows, pairs or judged answers."""
        return len(self) // self.together

    def rows_of(self, example: int) -> range:
        """Indices of the rows that are trained of a row of the source."""
        first = self.together * example
        return range(first, first + (1 if self.judged_alone else self.together))

    def judgement(self, index: int) -> str | None:
        """What is said of a row in a data set of preferences; None in others."""
        if self.together == 1:
            return None
        words = ("undesirable", "desirable") if self.judged_alone else ("rejected", "chosen")
        return words[self.is_desirable(index)]

    def is_desirable(self, index: int) -> bool:
        """Whether a row of a data set of preferences is a chosen or desirable answer."""
        return bool(self._desirable[index])

    def count_tokens(self) -> tuple[int, int]:
        """The number of tokens in all rows, and of those that are labels."""
        spans = np.frombuffer(self._spans, np.int32).reshape(-1, 2)
        return len(self._tokens), count_labels(spans)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = np.frombuffer(self._tokens, np.int32)
        spans = np.frombuffer(self._spans, np.int32).reshape(-1, 2)
        return (
            tokens[self._starts[index] : self._starts[index + 1]],
            spans[self._span_starts[index] : self._span_starts[index + 1]],
        )

    def labels(self) -> np.ndarray:
        """The distinct labelled tokens: int32, sorted."""
        trained = np.zeros(len(self._tokens), bool)
        for first, (_, spans) in zip(self._starts[:-1], self, strict=True):
            for start, stop in spans:
                trained[first + start : first + stop] = True
        return np.unique(np.frombuffer(self._tokens, np.int32)[trained])

    def check_vocabulary(self, size: int) -> None:
        """Raise `EdgeLoraError` if a token is not in a vocabulary of `size` tokens."""
        tokens = np.frombuffer(self._tokens, np.int32)
        outside = np.flatnonzero((tokens < 0) | (tokens >= size))
        if outside.size:
            row = bisect_right(self._starts, outside[0]) - 1
            raise EdgeLoraError(
                f"{self.place(row)}: has token {tokens[outside[0]]}, but the model's vocabulary "
                f"ends at {size - 1}; its tokenizer belongs to another model"
            )

    def place(self, index: int) -> str:
        """File and line of a row, for messages: `data/train.jsonl: line 7`."""
        source = bisect_right(self._sources, index, key=lambda start_and_name: start_and_name[0])
        return f"{self._sources[source - 1][1]} {self._numbers[index]}"


def _nothing_to_train(report: DataReport) -> EdgeLoraError:
    if report.rows == 0:
        return EdgeLoraError(f"{report.name}: has no rows, expected at least one")
    text = f"{report.name}: none of its {report.rows} rows has a token to train on"
    lines = report.findings.lines()
    if report.longest > report.max_seq_length:
        text += f" within max_seq_length {report.max_seq_length}"
        lines.insert(0, "raise it, or train on more of each row by --train-on everything")
    elif not lines:
        lines = ["add rows with an answer to train on"]
    return EdgeLoraError("; ".join([text, *lines]))
