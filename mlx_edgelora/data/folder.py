"""Which files of a folder, or splits of a data set, are its training, validation and test sets."""

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
# As the Hugging Face Hub cuts large files: train-00000-of-00002.parquet.
SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})")
# So many other files are named where a set is missing.
NAMED = 5


class Files(NamedTuple):
    """What a folder holds.

    Attributes:
        splits: the files of each wanted set, of which some may have none.
        others: names of data files that belong to no set, or of other entries without any.
    """

    splits: dict[str, list[Path]]
    others: list[str]

    def missing(self, split: str) -> str:
        """What was looked for and what there is, for the sentence about a missing set."""
        usual, other = SPLITS[split][:2]
        found = f", found {', '.join(self.others[:NAMED])}" if self.others else ""
        return f"{split}.jsonl in the folder (or {usual}.csv, {other}.json, ...){found}"


def find_files(folder: Path, wanted: Sequence[str] = tuple(SPLITS)) -> Files:
    """The files of the sets: `train.jsonl` before others, then the only one of a known name.

    Args:
        folder: to look into.
        wanted: the sets that are looked for.

    Raises:
        EdgeLoraError: the folder cannot be read, several files could be the same set, or a part
            of one is missing.
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
    """The one among the splits of a data set that is the set of this name."""
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
    """A name in lower case without the endings that say how it is read."""
    return Path(name.lower().removesuffix(".gz")).stem
