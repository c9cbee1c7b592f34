"""Remarks on the tokenization of rows: lost contents, and choices made."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_edgelora.errors import EdgeLoraError

# The run stops if at least this share of the rows with some kind of content lose it.
RULE = 0.1
# Number of lines at the start of a run; the data command shows all.
LINES = 3


@dataclass(frozen=True)
class Kind:
    """A kind of remark on rows.

    Attributes:
        text: text of a message, after the number of rows.
        remedy: what to do about it; empty for mere information.
        lost: whether content is missing from the tokens; `text` then begins with that content.
    """

    text: str
    remedy: str = ""
    lost: bool = False


_TEMPLATE = (
    "use a model whose chat template writes {}, or a chat_template.jinja in its folder that does"
)
REASONING = Kind(
    "with reasoning in an answer lose it: the chat template cuts it out",
    _TEMPLATE.format("it") + ", or rows of text",
    lost=True,
)
TOOL_CALLS = Kind(
    "with tool calls lose them: the chat template does not write them",
    _TEMPLATE.format("tool calls"),
    lost=True,
)
TOOLS = Kind(
    "with tool descriptions lose them: the chat template does not write them",
    _TEMPLATE.format("tools"),
    lost=True,
)
SYSTEM = Kind(
    "with a system message lose it: the chat template does not write it here",
    "put its text into the first user message, or try --train-on answers, which writes each "
    "prompt as generation does",
    lost=True,
)
TEXT = Kind(
    "with messages lose text of them: the chat template does not write it",
    _TEMPLATE.format("it") + ", or change the rows",
    lost=True,
)
UNKNOWN = Kind(
    "with characters that the tokenizer has no tokens for",
    "take them out of the rows, or use a model whose tokenizer knows them",
    lost=True,
)
NO_TEXT = Kind("without text, left out")
NO_ANSWER = Kind("without an answer, left out", "give answers the role 'assistant'")
EMPTY = Kind("with an empty answer, which is not trained")
UNANSWERED = Kind("with a last message that is no answer; it was left off")
EARLIER = Kind(
    "with several answers: only the last one is trained", "--train-on answers trains all"
)
CUT_EARLIER = Kind("without the reasoning of earlier answers, as the chat template writes prompts")
APART = Kind(
    "with earlier answers that the chat template writes differently: each became a row of its own"
)
OPENING = Kind(
    "with an answer before which generation adds text that the row does not have; a model is "
    "asked otherwise than it was tuned"
)
ADDED_END = Kind(
    "with an answer at which generation would not end: the end-of-sequence token was added"
)
NEVER_ENDS = Kind(
    "with an answer at which generation does not end, and no end-of-sequence token to add",
    "give the tokenizer an eos_token",
)


class Finding(NamedTuple):
    """A remark on one row.

    Attributes:
        kind: kind of the remark.
        shown: text of the row as an example; may be empty.
    """

    kind: Kind
    shown: str = ""


@dataclass
class _Count:
    rows: int = 0
    place: str = ""
    shown: str = ""


@dataclass
class Findings:
    """Numbers of rows in a data set by kind of remark, with the first row of each kind.

    Attributes:
        rows: number of all rows.
    """

    rows: int = 0
    _counts: dict[Kind, _Count] = field(default_factory=dict)
    _having: dict[Kind, int] = field(default_factory=dict)

    def add(self, place: str, having: Iterable[Kind], findings: Iterable[Finding]) -> None:
        """Count a row.

        Args:
            place: file and line of the row.
            having: kinds of content in the row that can be lost.
            findings: remarks on the row.
        """
        self.rows += 1
        for kind in set(having):
            self._having[kind] = self._having.get(kind, 0) + 1
        seen = set()
        for finding in findings:
            if finding.kind in seen:
                continue
            seen.add(finding.kind)
            count = self._counts.setdefault(finding.kind, _Count(0, place, finding.shown))
            count.rows += 1

    def count(self, kind: Kind) -> int:
        """Number of rows with a remark of this kind."""
        return self._counts[kind].rows if kind in self._counts else 0

    def lines(self, most: int | None = None) -> list[str]:
        """A line for each kind of remark, lost contents first; at most `most` lines."""
        kinds = sorted(self._counts, key=lambda kind: not kind.lost)
        lines = [self._line(kind) for kind in kinds]
        if most is not None and len(lines) > most:
            left = len(lines) - most + 1
            lines[most - 1 :] = [f"{left} more remarks: mlx-edgelora data shows them"]
        return lines

    def refuse_lost(self, name: str) -> None:
        """Check that content is not lost from many rows.

        Args:
            name: name of the data set.

        Raises:
            EdgeLoraError: at least a tenth of the rows with some kind of content lose it.
        """
        for kind in self._counts:
            if kind.lost and self.count(kind) >= RULE * self._having.get(kind, self.rows):
                raise EdgeLoraError(
                    f"{name}: {self._line(kind, with_remedy=False)}; {kind.remedy}, or train "
                    "without it by --allow-lost-content"
                )

    def _line(self, kind: Kind, with_remedy: bool = True) -> str:
        count = self._counts[kind]
        number = "1 row" if count.rows == 1 else f"{count.rows:,} rows"
        if kind.lost:
            number = f"{count.rows:,} of {self._having.get(kind, self.rows):,} rows"
        shown = f", {_short(count.shown)}" if count.shown else ""
        remedy = f"; {kind.remedy}" if kind.remedy and with_remedy else ""
        return f"{number} {kind.text} (first: {count.place}{shown}){remedy}"


def _short(text: str) -> str:
    shown = repr(" ".join(text.split()))
    return shown if len(shown) <= 40 else f"{shown[:37]}...'"
