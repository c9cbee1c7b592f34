"""Read rows from CSV, TSV and Parquet files, and from plain text."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_edgelora.data.lines import ROW_LIMIT, decode, read_lines
from mlx_edgelora.errors import EdgeLoraError

Rows = Iterator[tuple[int, Mapping[str, Any]]]

# Separators of a file whose header has no comma; spreadsheets write them in some locales.
OTHER_SEPARATORS = (";", "\t")
# Number of rows of a Parquet file that are converted to Python objects at once.
ROWS_AT_ONCE = 256


def read_text(path: Path) -> Rows:
    """The lines of a text file as rows with their line numbers; blank lines are skipped."""
    for number, line in read_lines(path):
        if line.strip():
            yield number, {"text": decode(f"{path}: line {number}", line).rstrip("\r\n")}


def read_csv(path: Path, separator: str | None = None) -> Rows:
    """The rows of a CSV file with a header, with the numbers of their first lines.

    Args:
        path: the file.
        separator: separator of cells; None for the one found in the header, by default a comma.

    Raises:
        EdgeLoraError: a line cannot be read, or has more or fewer cells than the header; the
            message names the file and line.
    """
    lines = (decode(f"{path}: line {number}", line) for number, line in read_lines(path))
    begin: list[str] = []
    for line in lines:
        begin.append(line)
        if line.strip():
            break
    separator = separator or _separator("".join(begin))
    records = _records(path, chain(begin, lines), separator)
    number, cells = next(records, (0, []))
    header = _header(f"{path}: line {number}", cells)
    for number, cells in records:
        if len(cells) != len(header):
            raise EdgeLoraError(
                f"{path}: line {number}: has {len(cells)} cells, expected {len(header)} as in the "
                f"header; put a cell that holds {separator!r} in quotes"
            )
        yield number, {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _records(path: Path, lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each record that is not blank, with the number of its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), ROW_LIMIT))  # global; 131,072 by default
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise EdgeLoraError(
                f"{path}: line {number}: is not CSV ({error}); put a cell that holds quotes, "
                "separators or line breaks in quotes, and double the quotes inside"
            ) from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield number, cells


def _separator(header: str) -> str:
    found = [mark for mark in OTHER_SEPARATORS if "," not in header and mark in header]
    return found[0] if found else ","


def _header(place: str, cells: list[str]) -> list[str]:
    """The names of the columns; a column without a name is not read."""
    names = [cell.strip() for cell in cells]
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            raise EdgeLoraError(f"{place}: the column {name!r} is there twice; rename one")
    return names


def read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file with their numbers; a few hundred are in memory at a time.

    Raises:
        EdgeLoraError: the package pyarrow is missing, or the file cannot be read.
    """
    try:
        import pyarrow  # noqa: PLC0415, optional
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise EdgeLoraError(
            f"{path}: Parquet is read by the package pyarrow, which is not installed; run "
            "`pip install 'mlx-edgelora[data]'`"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EdgeLoraError(
            f"{path}: row {number + 1}: cannot be read as Parquet ({reason}); write it again"
        ) from error


def without_nulls(value: Any) -> Any:
    """A row of a columnar file without null values, at every depth.

    Columnar files fill in null for keys that only other rows have.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(part) for part in value]
    return value
