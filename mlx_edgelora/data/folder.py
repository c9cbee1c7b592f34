"""Find the training, validation and test sets among files of a folder or splits of a data set."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_edgelora.data.sources import data_suffix
from mlx_edgelora.errors import EdgeLoraError

SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# Shards of large files on the Hugging Face Hub: train-00000-of-00002.parquet.
SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})")
# Largest number of other files that the message about a missing set names.
NAMED = 5


class Files(NamedTuple):
    """The files of a folder.

    Attributes:
        splits: files of each wanted set; an empty list for a set that is missing.
        others: names of data files that belong to no set; names of all other entries if there are
            no such data files.
    """

    splits: dict[str, list[Path]]
    others: list[str]

    def missing(self, split: str) -> str:
        """Expected and found file names, for the message about a missing set."""
        usual, other = SPLITS[split][:2]
        found = f", found {', '.join(self.others[:NAMED])}" if self.others else ""
        return f"{split}.jsonl in the folder (or {usual}.csv, {other}.json, ...){found}"


def find_files(folder: Path, wanted: Sequence[str] = tuple(SPLITS)) -> Files:
    """Find the files of data sets: `train.jsonl` first, else the only file with a known name.

    Args:
        folder: the folder.
        wanted: names of the sets to find.

    Raises:
        EdgeLoraError: the folder cannot be read, several files could be the same set, or a shard
            of a set is missing.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise EdgeLoraError(f"data: {folder} cannot be read ({error.strerror})") from error
    splits = {split: _files_of(split, folder, names) for split in wanted}
    taken = {path.name for paths in splits.values() for path in paths}
    rest = [name for name in names if name not in taken]
    return Files(splits, [name for name in rest if data_suffix(Path(name))] or rest)


def find_split(split: str, names: Iterable[str]) -> str | None:
    """The name of a set among the splits of a data set; None if it is missing."""
    names = list(names)
    return next((name for name in SPLITS[split] if name in names), None)


def _files_of(split: str, folder: Path, names: list[str]) -> list[Path]:
    mlx_lm = f"{split}.jsonl"
    if mlx_lm in names:
        return [folder / mlx_lm]
    found = [name for name in names if _split_of(name) == split]
    shards = [SHARD.fullmatch(_stem(name)) for name in found]
    if len(found) > 1 and all(shards):
        kinds = {(match["name"], match["count"]) for match in shards if match}
        suffixes = {data_suffix(Path(name)) for name in found}
        if len(kinds) == 1 and len(suffixes) == 1:
            _check_complete(folder, found, int(shards[0]["count"]))
            return [folder / name for name in found]
    elif len(found) == 1:
        if shards[0]:
            _check_complete(folder, found, int(shards[0]["count"]))
        return [folder / found[0]]
    if found:
        raise EdgeLoraError(
            f"data: {folder} has several files for its {split} set, {', '.join(found[:NAMED])}, "
            f"expected one; keep one, or call it {mlx_lm}"
        )
    return []


def _check_complete(folder: Path, found: list[str], count: int) -> None:
    if len(found) != count:
        raise EdgeLoraError(
            f"data: {folder} has {len(found)} of the {count} parts of which {found[0]} is one; "
            "download the others"
        )


def _split_of(name: str) -> str | None:
    if data_suffix(Path(name)) is None:
        return None
    stem = _stem(name)
    shard = SHARD.fullmatch(stem)
    stem = shard["name"] if shard else stem
    return next((split for split, names in SPLITS.items() if stem in names), None)


def _stem(name: str) -> str:
    """A file name in lower case, without its format and `.gz`."""
    return Path(name.lower().removesuffix(".gz")).stem
