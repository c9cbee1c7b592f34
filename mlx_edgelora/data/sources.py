"""Where rows come from: one file of a kind that is read here, or the rows of a data set."""

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
    """Rows and what to call them.

    Attributes:
        name: in messages.
        row_name: before a row's number.
        read: begins to read numbered rows, as often as it is called.
        is_text: whether each row is `{"text": ...}`, whatever columns the run names.
    """

    name: str
    row_name: str
    read: Callable[[], Iterator[tuple[int, Mapping[str, Any]]]]
    is_text: bool = False

    @property
    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Numbered rows, from the first on."""
        return self.read()


def jsonl_source(path: Path) -> Source:
    """The objects of a JSONL file with their line numbers; blank lines are skipped.

    Its rows raise `EdgeLoraError` naming the file and line that is not a JSON object.
    """
    return Source(str(path), f"{path}: line", partial(read_json_lines, path))


def file_source(path: Path) -> Source:
    """The rows of a file, read as its name says; only a list in a .jsonl file is read as one.

    Its rows, of which few are in memory at once, raise `EdgeLoraError` naming file and line.

    Raises:
        EdgeLoraError: the name says nothing, or the file cannot be read.
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
    """The ending of a name by which a file is read, without .gz; None for other files."""
    name = path.name.lower()
    is_packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    # Parquet is compressed inside, and not read from a stream.
    return suffix if suffix in SUFFIXES and not (is_packed and suffix == ".parquet") else None
