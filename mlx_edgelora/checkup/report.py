"""The report of a checkup in sections, as text and as JSON without private data."""

import gc
import getpass
import json
import math
import os
import platform
import pwd
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import mlx.core as mx

from mlx_edgelora.checkup import caches, probes, system, training
from mlx_edgelora.checkup.job import Checkup, Found, run_probe
from mlx_edgelora.measure.units import duration, size

SCHEMA = "mlx-edgelora-report"
# Version of the report. Raise it when a name is removed or its meaning changes.
VERSION = 1
WIDTH = 80
SECTIONS: dict[str, Callable[[Checkup], Found]] = {
    "versions": system.versions,
    "device": system.device,
    "memory": system.memory,
    "precision": probes.precision,
    "disk": probes.disk,
    "caches": caches.caches,
    "verify": training.verify,
    "steps": training.steps,
    "attention": probes.attention,
    "rates": probes.rates,
    "wrap": probes.wrap,  # late: a Mac in Metal's validation mode ends the process there
    "footprint": system.footprint,
}


def make_report(job: Checkup, on_section: Callable[[Found], None]) -> Found:
    """Run all sections; the error of a failed section is part of the report.

    Args:
        job: the checkup.
        on_section: called with the report after each section, so that a report exists even if the
            process dies.

    Returns:
        {"schema", "version", "complete", "seconds", "sections": {name: {"seconds", "error",
        "found"}}}; "complete" is false until the last section is done.
    """
    clean = Cleaner(job.folder)
    sections: Found = {}
    report: Found = {"schema": SCHEMA, "version": VERSION, "complete": False, "seconds": 0.0}
    report["sections"] = sections
    for name, section in SECTIONS.items():
        start = time.monotonic()
        gc.collect()
        mx.clear_cache()
        found = clean(run_probe(section, job))
        error = found.pop("error", None)
        now = time.monotonic()
        sections[name] = {"seconds": round(now - start, 2), "error": error, "found": found}
        report["seconds"] = round(now - job.began, 2)
        report["complete"] = len(sections) == len(SECTIONS)
        on_section(report)
    return report


def problems(report: Mapping[str, Any]) -> list[str]:
    """A line for each failure and each wrong result."""
    lines = []
    for name, section in report["sections"].items():
        found = section["found"]
        if section["error"]:
            lines.append(f"{name}: {section['error']}")
        for key, rows in found.items():
            # On a CPU, MLX cannot use mapped memory in place. Such an error is only in its row.
            if key != "wraps":
                lines += [f"{name}: {row['error']}" for row in _tables(rows) if "error" in row]
        lines += [f"{name}: WRONG: {text}" for text in found.get("wrong", [])]
        lines += [
            f"{name}: WRONG: {row['bytes']} bytes from {row['start']}"
            for row in found.get("wraps", [])
            if row.get("right") is False
        ]
        lines += [
            f"{name}: {row['name']} took {format_value('bytes', row['measured_bytes'])} of "
            f"{format_value('bytes', row['budget_bytes'])}"
            for row in _tables(found.get("steps"))
            if row.get("measured_bytes", 0) > row.get("budget_bytes", 0)
        ]
    return lines


def as_json(report: Mapping[str, Any]) -> bytes:
    """The report as the content of a JSON file."""
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()


def lines_of(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    """A section as lines of at most 80 columns."""
    yield f"{name} ({section['seconds']:.1f} s)"
    if section["error"]:
        yield from wrap(f"failed: {section['error']}", WIDTH - 2, **_indents(2, 2))
    yield from _lines(section["found"], 2)


def _lines(found: Mapping[str, Any], indent: int) -> Iterator[str]:
    width = max((len(label(key)) for key in found), default=0)
    for key, value in found.items():
        if rows := _tables(value):
            yield from _table(rows, indent)
            continue
        if isinstance(value, Mapping):
            if value:
                yield " " * indent + label(key)
                yield from _lines(value, indent + 2)
            continue
        head = f"{label(key):<{width}}  "
        for text in value if isinstance(value, list) else [format_value(key, value)]:
            yield from wrap(head + text, WIDTH - 1, **_indents(indent, indent + width + 2))
            head = " " * len(head)


def _indents(first: int, other: int) -> dict[str, Any]:
    return {"initial_indent": " " * first, "subsequent_indent": " " * other}


def _table(rows: list[Mapping[str, Any]], indent: int) -> Iterator[str]:
    """A table in columns, or row by row if it is too wide; the error of a row follows it."""
    names = list(
        dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, str | float | int))
    )
    names = [name for name in names if name != "error"]
    cells = [[format_value(n, row[n]) if n in row else "" for n in names] for row in rows]
    heads = list(map(label, names))
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    in_columns = indent + sum(widths) + len(widths) <= WIDTH
    if in_columns:
        yield " " * indent + _row(heads, widths)
    for line, row in zip(cells, rows, strict=True):
        if in_columns:
            yield " " * indent + _row(line, widths)
        else:
            pairs = ", ".join(f"{h} {c}" for h, c in zip(heads, line, strict=True) if c)
            yield from wrap(pairs, WIDTH - 1, **_indents(indent, indent + 2))
        if "error" in row:
            yield from wrap(row["error"], WIDTH - 1, **_indents(indent + 4, indent + 4))


def _row(cells: list[str], widths: list[int]) -> str:
    return " ".join(c.rjust(width) for c, width in zip(cells, widths, strict=True)).rstrip()


def label(key: str) -> str:
    """The text for a key of the JSON report, without its unit."""
    short = key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
    return f"{short} time" if key.endswith("_seconds") else short


def format_value(key: str, value: Any) -> str:
    """A value as text, with its unit."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if key.endswith("bytes") and isinstance(value, int):
        return size(value)
    if key.endswith("seconds"):
        return duration(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tables(value: Any) -> list[Mapping[str, Any]]:
    """The rows of a table; empty if the value is not a table."""
    is_table = isinstance(value, list) and all(isinstance(row, Mapping) for row in value)
    return value if is_table else []


class Cleaner:
    """Converts findings to JSON values and removes private data: home, user, host, folders.

    Args:
        folder: folder of scratch files.
    """

    def __init__(self, folder: Path) -> None:
        places = [(folder, "<scratch>"), (Path.home(), "~"), (Path.cwd(), "<here>")]
        places += [(path.resolve(), text) for path, text in places]
        places.sort(key=lambda place: -len(str(place[0])))
        self._texts = [
            (re.compile(re.escape(str(path)) + r"(?![\w-])"), text)
            for path, text in places
            if len(path.parts) > 1
        ]
        for names, text in ((_users(), "<user>"), (_hosts(), "<host>")):
            for name in sorted(filter(None, names), key=len, reverse=True):
                self._texts.append((re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), text))

    def __call__(self, value: Any) -> Any:
        """The value as a JSON value without private data."""
        if isinstance(value, Mapping):
            return {str(key): self(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self(part) for part in value]
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        text = str(value)
        for pattern, stand_in in self._texts:
            text = pattern.sub(stand_in, text)
        return text


def _users() -> set[str]:
    names = {Path.home().name}
    for name in (getpass.getuser, lambda: pwd.getpwuid(os.getuid()).pw_gecos.partition(",")[0]):
        try:
            names.add(name())
        except (KeyError, OSError, ImportError):
            continue  # the system does not know the user
    return names


def _hosts() -> set[str]:
    names = {socket.gethostname(), platform.node()}
    return names | {name.partition(".")[0] for name in names}
