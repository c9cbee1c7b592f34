"""The preview as lines of at most 80 columns, for a terminal."""

import unicodedata
from collections.abc import Iterator, Sequence
from textwrap import wrap

from mlx_edgelora.data import Dataset
from mlx_edgelora.preview import facts
from mlx_edgelora.preview.facts import Segment

COLUMNS = 80
BAR = 40
# Largest number of characters of a segment that are shown: its beginning and its end.
SHOWN = 400
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
MARKS, ASCII_MARKS = ("⟦", "⟧"), (">>", "<<")


def fitted(text: str, indent: str = "  ") -> list[str]:
    """Wrap a line to at most 80 columns."""
    return wrap(text, COLUMNS, subsequent_indent=indent, break_on_hyphens=False) or [""]


def overview(name: str, dataset: Dataset) -> list[str]:
    """Lines about rows, tokens and labels of a data set, with a histogram of lengths."""
    report, lengths = dataset.report, facts.lengths_of(dataset)
    lines = [
        *fitted(f"{name}: {report.name}"),
        f"  rows       {report.rows:,} read, {dataset.examples:,} to train on"
        + (f", {report.dropped:,} left out" if report.dropped else ""),
        f"  tokens     {report.tokens:,}; {100 * facts.labelled_share(dataset):.3g} % of them "
        f"labels ({report.labels:,})",
        f"  lengths    median {int(_median(lengths)):,}, longest {report.longest:,} tokens"
        + (f"; cut to {report.max_seq_length:,}" if report.truncated else ""),
    ]
    bins = facts.histogram(lengths)
    most = max(part.rows for part in bins)
    for part in bins:
        bar = "#" * -(-BAR * part.rows // most)
        name = f"{part.first:,}-{part.last:,}" if part.first < part.last else f"{part.first:,}"
        lines.append(f"  {name:>15} {bar:<{BAR}} {part.rows:>9,}")
    return lines


def _median(lengths: Sequence[int]) -> float:
    ordered = sorted(lengths)
    return ordered[len(ordered) // 2]


def row(place: str, segments: Sequence[Segment], marks: tuple[str, str] | None) -> list[str]:
    """Lines of a row's text, with its labels in colour or between marks.

    Args:
        place: name of the row.
        segments: text of the row.
        marks: marks around labels; None for colours.
    """
    tokens = sum(part.tokens for part in segments)
    labels = sum(part.tokens for part in segments if part.is_labelled)
    lines = fitted(f"{place} ({tokens:,} tokens, {labels:,} of them labels)")
    characters = [
        (character, part.is_labelled)
        for part in segments
        for character in _marked(_shortened(part.text), part.is_labelled, marks)
    ]
    return lines + ["  " + line for line in _wrapped(characters, coloured=marks is None)]


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    left_out = len(text) - SHOWN
    return f"{text[: SHOWN // 2]} … {left_out:,} characters … {text[-SHOWN // 2 :]}"


def _marked(text: str, is_labelled: bool, marks: tuple[str, str] | None) -> str:
    return f"{marks[0]}{text}{marks[1]}" if marks and is_labelled else text


def _wrapped(characters: Sequence[tuple[str, bool]], coloured: bool) -> Iterator[str]:
    """Wrap characters; each line sets its own colours, and control characters are escaped."""
    line: list[str] = []
    width, colour = 0, False

    def ended() -> str:
        nonlocal line, width, colour
        text = "".join(line) + (PLAIN if colour else "")
        line, width, colour = [], 0, False
        return text

    for character, is_labelled in characters:
        if character == "\n":
            yield ended()
            continue
        shown = _printable(character)
        size = sum(_width(one) for one in shown)
        if width + size > COLUMNS - 2:
            yield ended()
        if coloured and is_labelled != colour:
            line.append(GREEN if is_labelled else PLAIN)
            colour = is_labelled
        line.append(shown)
        width += size
    if line:
        yield ended()


def _printable(character: str) -> str:
    if character == "\t":
        return "    "
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
