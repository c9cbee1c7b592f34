"""Find the rows of a run's training, validation and test sets, before tokenization."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_edgelora.config import HubDataset, TrainConfig
from mlx_edgelora.data.conversation import CanonicalRow, RowError
from mlx_edgelora.data.folder import SPLITS, find_files, find_split
from mlx_edgelora.data.hub import hub_sources, hub_split_source
from mlx_edgelora.data.row_kinds import Features, RowKind, find_kind
from mlx_edgelora.data.sources import Source, data_suffix, file_source
from mlx_edgelora.errors import EdgeLoraError

# Number of rows from which the kind of all rows is recognized.
SAMPLE = 100
PURPOSES = {"train": "training", "valid": "validation", "test": "the test"}
# A function from the name of a missing set to a description of what is expected.
Missing = Callable[[str], str]


class Part(NamedTuple):
    """All or some rows of one source, all of the same kind.

    Attributes:
        source: source of the rows.
        kind: kind of the rows.
        only: bool [rows], the rows that belong to this part; None for all rows.
        name: name of the part in messages.
    """

    source: Source
    kind: RowKind
    only: np.ndarray | None
    name: str

    def rows(self) -> Iterator[tuple[int, CanonicalRow]]:
        """Rows in their canonical form with their numbers, one in memory at a time.

        Raises:
            EdgeLoraError: a row cannot be read; the message names its file and line.
        """
        for position, (number, row) in enumerate(self.source.rows):
            if self.only is None or self.only[position]:
                try:
                    yield number, self.kind.read(row)
                except RowError as error:
                    raise EdgeLoraError(f"{self.source.row_name} {number}: {error}") from error


class Sets(NamedTuple):
    """The rows that a run needs.

    Attributes:
        train: parts of the training set; empty if the run does not need it.
        valid: parts of the validation set; empty if the run does not need it or it is missing.
        test: parts of the test set; empty if the run does not need it.
        about: a line about the sources and kinds of the rows, and a line if the validation set is
            missing.
    """

    train: list[Part]
    valid: list[Part]
    test: list[Part]
    about: list[str]


def find_sets(config: TrainConfig) -> Sets:
    """Find the sets that a run needs, and the kinds of their rows.

    Args:
        config: options of the run. `hf_dataset` takes precedence over `data`, which is a folder,
            a file or a name on the Hugging Face Hub. With `train` the training and validation
            sets are needed, with `test` the test set. `val_split` splits the validation set off
            the training set.

    Raises:
        EdgeLoraError: a training or test set is missing, or a set has no rows or cannot be read.
    """
    wanted = {
        "train": config.train,
        "valid": config.train and config.val_batches != 0,
        "test": config.test,
    }
    names = [split for split, is_wanted in wanted.items() if is_wanted]
    parts, missing = _find_parts(config, names)
    if config.val_split is not None and config.train:
        parts = _split_off(parts, config.val_split, config.seed)
    notes = []
    for split in names:
        if not parts[split] and split != "valid":
            raise EdgeLoraError(
                f"data: {config.data} has no {split} set, expected {missing(split)}"
            )
        if not parts[split]:
            notes.append(
                f"no valid set, so no validation (expected --val-split 0.05, or {missing(split)})"
            )
    train, valid, test = (parts.get(split, []) for split in SPLITS)
    return Sets(train, valid, test, [_about(parts), *notes])


_Parts = dict[str, list[Part]]


def _find_parts(config: TrainConfig, wanted: Sequence[str]) -> tuple[_Parts, Missing]:
    """The parts of each wanted set, and a description of what is expected for a missing set."""
    if config.hf_dataset is not None:
        return _find_hub_entries(config, config.hf_dataset, wanted), str
    if config.data is None:
        raise EdgeLoraError("data: got nothing, expected a folder, a file or a Hugging Face name")
    sources, missing = _find_sources(config.data, wanted)
    features = _features(config)
    parts = {
        split: [_part(source, features, config) for source in sources.get(split, ())]
        for split in wanted
    }
    return parts, missing


def _find_sources(
    data: str, wanted: Sequence[str]
) -> tuple[Mapping[str, Iterable[Source]], Missing]:
    place = Path(os.path.expanduser(data))
    if os.path.isdir(place):  # false without permission, where Path.is_dir() raises
        files = find_files(place, wanted)
        found = {split: [file_source(path) for path in files.splits[split]] for split in wanted}
        return found, files.missing
    if os.path.exists(place) or data_suffix(place) is not None:
        # A single file is the training set, or the test set of a run without training.
        return {wanted[0]: [file_source(place)]}, _missing_beside_file
    if place.is_absolute() or data.startswith((".", "~")) or len(place.parts) > 2:
        raise EdgeLoraError(
            f"data: {data} does not exist, expected a folder with train.jsonl, or a file"
        )
    splits = hub_sources(data)
    names = {split: find_split(split, splits) for split in wanted}
    return {
        split: [splits[name]] for split, name in names.items() if name
    }, lambda split: f"a split called {' or '.join(SPLITS[split])}, found {', '.join(splits)}"


def _missing_beside_file(split: str) -> str:
    if split == "valid":
        return "a folder with valid.jsonl"
    return f"a folder with train.jsonl and {split}.jsonl, because one file is one set"


def _find_hub_entries(
    config: TrainConfig, entries: Sequence[HubDataset], wanted: Sequence[str]
) -> _Parts:
    """Join several entries to one data set in their order, as mlx-lm does."""
    parts: _Parts = {split: [] for split in wanted}
    for entry in entries:
        splits = {
            "train": entry.train_split,
            "valid": entry.valid_split,
            "test": entry.test_split,
        }
        for split, found in parts.items():
            if splits[split] is None:
                raise EdgeLoraError(
                    f"hf_dataset.{split}_split: missing for {entry.path}, expected rows to test on "
                    "such as test[:100]"
                )
            source = hub_split_source(entry, splits[split])
            found.append(_part(source, _features(config, entry), config))
    return parts


def _features(config: TrainConfig, entry: HubDataset | None = None) -> Features:
    names = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")
    return Features(*(getattr(entry, name, None) or getattr(config, name) for name in names))


def _part(source: Source, features: Features, config: TrainConfig) -> Part:
    """All rows of a source, with their kind."""
    sample = list(islice(source.rows, SAMPLE))
    if not sample:
        raise EdgeLoraError(f"{source.name}: has no rows, expected at least one")
    features = Features() if source.is_text else features
    rows = [row for _, row in sample]
    try:
        loss = config.loss if config.compares_answers else None
        kind = find_kind(rows, features, config.data_format, config.system_prompt, loss)
    except RowError as error:
        raise EdgeLoraError(f"{source.row_name} {sample[0][0]}: {error}") from error
    return Part(source, kind, None, source.name)


def _split_off(parts: _Parts, share: float, seed: int) -> _Parts:
    """Move a share of the training rows, drawn at random, to the validation set."""
    if parts["valid"]:
        raise EdgeLoraError(
            f"val_split: got {share:g}, but there is a valid set, {parts['valid'][0].name}; leave "
            "one of them out"
        )
    train, valid = [], []
    random = np.random.RandomState(seed)
    for part in parts["train"]:
        count = sum(1 for _ in part.source.rows)
        taken = max(1, round(share * count))
        if taken >= count:
            raise EdgeLoraError(
                f"val_split: got {share:g}, but {part.name} has {count} rows, too few to split off "
                "that share; leave it out or add rows"
            )
        chosen = np.zeros(count, bool)
        chosen[random.permutation(count)[:taken]] = True
        shown = f"{part.name} ({taken:,} of {count:,} rows, seed {seed})"
        train.append(part._replace(only=~chosen, name=f"{part.name} (without the valid set)"))
        valid.append(part._replace(only=chosen, name=shown))
    return parts | {"train": train, "valid": valid}


def _about(parts: _Parts) -> str:
    """A line about the kinds of rows; sources are named unless they have mlx-lm's file names."""
    by_kind: dict[str, list[str]] = {}
    for split, found in parts.items():
        kinds: dict[str, list[str]] = {}
        for part in found:
            kinds.setdefault(str(part.kind), []).append(os.path.basename(part.name))
        for kind, names in kinds.items():
            more = f" and {len(names) - 1} more" if names[1:] else ""
            by_kind.setdefault(kind, []).append(f"{names[0]}{more} for {PURPOSES[split]}")
    are_usual = all(
        os.path.basename(part.name) == f"{split}.jsonl"
        for split, found in parts.items()
        for part in found
    )
    if len(by_kind) == 1 and are_usual:
        return next(iter(by_kind))
    return "; ".join(f"{', '.join(names)}: {kind}" for kind, names in by_kind.items())
