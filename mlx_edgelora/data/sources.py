"""Sources of rows: a file of a known format, or a split of a data set."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlx_edgelora.data.json_files import is_document, read_document, read_json_lines
from mlx_edgelora.data.tables import read_csv, read_parquet, read_text
from mlx_edgelora.errors import EdgeLoraError

LINES = (".jsonl", ".ndjson")
TEXT = ".txt"
SUFFIXES = (*LINES, ".json", ".csv", ".tsv", ".parquet", TEXT)


class Source(NamedTuple):
    """A source of rows.

    Attributes:
        name: name of the source in messages.
        row_name: name of a row in messages, followed by its number.
        read: reads the numbered rows from the start; may be called several times.
        is_text: whether each row is `{"text": ...}`, whatever columns the options name.
    """

    name: str
    row_name: str
    read: Callable[[], Iterator[tuple[int, Mapping[str, Any]]]]
    is_text: bool = False

    @property
    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The numbered rows from the start."""
        return self.read()


def jsonl_source(path: Path) -> Source:
    """The objects of a JSONL file with their line numbers; blank lines are skipped.

    Reading raises `EdgeLoraError` for a line that is not a JSON object, with its file and number.
    """
    return Source(str(path), f"{path}: line", partial(read_json_lines, path))


def file_source(path: Path) -> Source:
    """The rows of a file, whose format follows from its name; .jsonl may contain a JSON list.

    Few rows are in memory at once. Reading raises `EdgeLoraError` with the file and line.

    Raises:
        EdgeLoraError: the name has no known ending, or the file cannot be read.
    """
    suffix = data_suffix(path)
    if suffix in (*LINES, ".json"):
        if is_document(path, by_lines=suffix in LINES):
            return Source(str(path), f"{path}: row", partial(read_document, path))
        return jsonl_source(path)
    if suffix == ".parquet":
        return Source(str(path), f"{path}: row", partial(read_parquet, path))
    if suffix == TEXT:
        return Source(str(path), f"{path}: line", partial(read_text, path), is_text=True)
    if suffix is not None:
        separator = "\t" if suffix == ".tsv" else None
        return Source(str(path), f"{path}: line", partial(read_csv, path, separator))
    raise EdgeLoraError(
        f"{path}: its name says no kind of file that is read, expected one that ends with "
        f"{', '.join(SUFFIXES)}; convert or rename it"
    )


def data_suffix(path: Path) -> str | None:
    """The ending of a file name that gives its format, without .gz; None for other files."""
    name = path.name.lower()
    is_packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    # Parquet has its own compression and cannot be read from a stream, so .gz is not supported.
    return suffix if suffix in SUFFIXES and not (is_packed and suffix == ".parquet") else None
