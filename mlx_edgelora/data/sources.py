"""Where rows come from: JSONL files and the Hugging Face Hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_edgelora.config import HubDataset
from mlx_edgelora.errors import EdgeLoraError


class Source(NamedTuple):
    """Rows and what to call them: `name` in messages, `row_name` before a row's number."""

    name: str
    row_name: str
    rows: Iterator[tuple[int, Mapping[str, Any]]]


def jsonl_source(path: Path) -> Source:
    """The objects of a JSONL file with their line numbers; blank lines are skipped.

    Its rows raise `EdgeLoraError` naming the file and line that is not a JSON object.
    """
    return Source(str(path), f"{path}: line", _read_jsonl(path))


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse_line(f"{path}: line {number}", line)
    except OSError as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error.strerror})") from error


def _parse_line(place: str, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise EdgeLoraError(f"{place}: is not UTF-8 text, expected a JSON object") from error
    except json.JSONDecodeError as error:
        raise EdgeLoraError(
            f"{place}: is not JSON ({error.msg} at column {error.colno}), expected one object "
            "per line"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise EdgeLoraError(f"{place}: is not JSON ({error}), expected one object") from error
    except RecursionError as error:
        raise EdgeLoraError(f"{place}: is nested too deeply, expected a JSON object") from error
    if b"\\ud" in line.lower() and not _is_unicode(row):
        raise EdgeLoraError(
            f"{place}: holds half of a surrogate pair, such as \\ud800, which is no character; "
            "take it out"
        )
    if not isinstance(row, dict):
        raise EdgeLoraError(
            f"{place}: got a JSON {type(row).__name__}, expected an object such as "
            '{"prompt": "...", "completion": "..."}'
        )
    return row


def _is_unicode(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def hub_sources(name: str) -> dict[str, Source]:
    """The splits of a data set on the Hugging Face Hub by their names.

    Raises:
        EdgeLoraError: the package `datasets` is missing, or the data set cannot be loaded.
    """
    splits = _load_from_hub(f"data: {name!r}, no folder here,", name, {})
    return {split: _hub_source(f"{name} {split}", rows) for split, rows in splits.items()}


def hub_split_source(entry: HubDataset, split: str) -> Source:
    """One split expression (`train[:80%]`) of an entry of `hf_dataset`; raises as above."""
    rows = _load_from_hub(f"hf_dataset: {entry.path!r}", entry.path, entry.config, split=split)
    return _hub_source(f"{entry.path} {split}", rows)


def _hub_source(name: str, rows: Any) -> Source:
    return Source(name, f"{name}: row", iter(enumerate(rows, start=1)))


def _load_from_hub(place: str, name: str, config: Mapping[str, Any], **split: str) -> Any:
    try:
        import datasets  # noqa: PLC0415, an optional package that is slow to import
    except ImportError as error:
        raise EdgeLoraError(
            f"{place} needs the package datasets to be loaded from the Hugging Face Hub; run "
            "`pip install datasets`, or give a folder"
        ) from error
    try:
        return datasets.load_dataset(name, **config, **split)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EdgeLoraError(
            f"{place} cannot be loaded from the Hugging Face Hub ({reason}); correct the name or "
            "the split, or give a folder"
        ) from error
