"""Format text for a terminal; no line is wider than `COLUMNS`."""

from collections.abc import Mapping
from textwrap import fill

COLUMNS = 80


def wrapped(text: str, columns: int = COLUMNS) -> str:
    """Break long lines between words; continuation lines are indented by two more columns."""
    return "\n".join(
        line if len(line) <= columns else _filled(line, columns) for line in text.splitlines()
    )


def named_rows(rows: Mapping[str, str], width: int, indent: int = 0) -> list[str]:
    """Format a table of names and texts; texts start after `width` columns and are wrapped."""
    return [
        fill(
            text,
            COLUMNS,
            initial_indent=" " * indent + name.ljust(width),
            subsequent_indent=" " * (indent + width),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    ]


def say(text: str) -> None:
    """Print a text with its long lines broken."""
    print(wrapped(text), flush=True)


def _filled(line: str, columns: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return fill(
        line.strip(),
        columns,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
