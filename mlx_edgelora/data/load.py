"""From a run's options to its tokenized train, valid and test sets."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_edgelora.config import HubDataset, TrainConfig
from mlx_edgelora.data.batches import check_batch_size
from mlx_edgelora.data.conversation import CanonicalRow, RowError
from mlx_edgelora.data.dataset import Dataset, Row
from mlx_edgelora.data.folder import SPLITS, find_files, find_split
from mlx_edgelora.data.formats import encoder
from mlx_edgelora.data.hub import hub_sources, hub_split_source
from mlx_edgelora.data.row_kinds import Features, RowKind, find_kind
from mlx_edgelora.data.sources import Source, data_suffix, file_source
from mlx_edgelora.errors import EdgeLoraError

# So many rows are looked at for the kind of all.
SAMPLE = 100
PURPOSES = {"train": "training", "valid": "validation", "test": "the test"}


def load_datasets(
    config: TrainConfig, tokenizer: Any, notify: Callable[[str], None] | None = None
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The train, valid and test sets that a run needs, tokenized and checked.

    Args:
        config: `hf_dataset` wins over `data`, which is a folder, a file or a name on the Hugging
            Face Hub. Train and valid sets are read if `train` is true, the test set if `test` is.
        tokenizer: as `mlx_lm.load` returns it.
        notify: gets a line about what the rows are and which set they come from, and one where
            there is no valid set.

    Returns:
        Three data sets; None for one that the run does not need, and for a valid set that
        does not exist. Print `dataset.report.warning()` of each.

    Raises:
        EdgeLoraError: a data set that is missing, cannot be read, holds a bad row (named by
            file and line) or has fewer usable rows than a batch.
    """
    wanted = _wanted(config)
    parts, missing = _find_parts(config)
    notes = []
    for split, is_wanted in wanted.items():
        if is_wanted and not parts[split]:
            if split == "valid":
                notes.append(f"no valid set, so no validation (expected {missing(split)})")
            else:
                raise EdgeLoraError(
                    f"data: {config.data} has no {split} set, expected {missing(split)}"
                )
    if notify is not None:
        for note in [_told(parts), *notes]:
            notify(note)
    train, valid, test = (
        _build(found, config, tokenizer) if found else None for found in parts.values()
    )
    return train, valid, test


def _wanted(config: TrainConfig) -> dict[str, bool]:
    return {
        "train": config.train,
        "valid": config.train and config.val_batches != 0,
        "test": config.test,
    }


class Part(NamedTuple):
    """Rows of one kind from one place, all of them or some.

    Attributes:
        source: the place.
        kind: what its rows are.
        only: which of its rows are taken, bool [rows]; None for all.
        name: what to call them.
    """

    source: Source
    kind: RowKind
    only: np.ndarray | None
    name: str

    def rows(self) -> Iterator[tuple[int, CanonicalRow]]:
        """Rows in their canonical form with their numbers; one is in memory at a time.

        Raises:
            EdgeLoraError: naming the place of a row that cannot be read.
        """
        for position, (number, row) in enumerate(self.source.rows):
            if self.only is None or self.only[position]:
                try:
                    yield number, self.kind.read(row)
                except RowError as error:
                    raise EdgeLoraError(f"{self.source.row_name} {number}: {error}") from error


_Parts = dict[str, list[Part]]
_Missing = Callable[[str], str]


def _find_parts(config: TrainConfig) -> tuple[_Parts, _Missing]:
    """Where each set comes from, and how to say that one is missing."""
    if config.hf_dataset is not None:
        return _find_hub_entries(config, config.hf_dataset), str
    if config.data is None:
        raise EdgeLoraError("data: got nothing, expected a folder, a file or a Hugging Face name")
    sources, missing = _find_sources(config, Path(os.path.expanduser(config.data)))
    features = _features(config)
    parts = {
        split: [_part(source, features, config) for source in found]
        for split, found in sources.items()
    }
    if config.val_split is not None and config.train:
        parts = _split_off(parts, config)
    return parts, missing


def _find_sources(config: TrainConfig, place: Path) -> tuple[dict[str, list[Source]], _Missing]:
    if os.path.isdir(place):  # unlike Path's, false instead of an error without permission
        files = find_files(place)
        wanted = _wanted(config)
        return {
            split: [file_source(path) for path in paths] if wanted[split] else []
            for split, paths in files.splits.items()
        }, files.missing
    if os.path.exists(place) or data_suffix(place) is not None:
        source = file_source(place)
        split = "train" if config.train else "test"
        return {name: [source] if name == split else [] for name in SPLITS}, _missing_beside_file
    if place.is_absolute() or config.data.startswith((".", "~")) or len(place.parts) > 2:
        raise EdgeLoraError(
            f"data: {config.data} does not exist, expected a folder with train.jsonl, or a file"
        )
    splits = hub_sources(config.data)
    names = {split: find_split(split, splits) for split, is_wanted in _wanted(config).items() if is_wanted}
    found = {split: [splits[names[split]]] if names.get(split) else [] for split in SPLITS}
    return found, lambda split: (
        f"a split called {' or '.join(SPLITS[split])}, found {', '.join(splits)}"
    )


def _missing_beside_file(split: str) -> str:
    if split == "valid":
        return "--val-split 0.05 or another share of the file, or a folder with valid.jsonl"
    return f"a folder with train.jsonl and {split}.jsonl: a file is one set"


def _find_hub_entries(config: TrainConfig, entries: Sequence[HubDataset]) -> _Parts:
    """As mlx-lm: several entries are one data set, in their order."""
    parts: _Parts = {split: [] for split in SPLITS}
    for entry in entries:
        splits = {}
        if config.train:
            splits["train"] = entry.train_split
            if config.val_batches != 0:
                splits["valid"] = entry.valid_split
        if config.test:
            if entry.test_split is None:
                raise EdgeLoraError(
                    f"hf_dataset.test_split: missing for {entry.path}, expected rows to test on "
                    "such as test[:100]"
                )
            splits["test"] = entry.test_split
        for split, name in splits.items():
            source = hub_split_source(entry, name)
            parts[split].append(_part(source, _features(config, entry), config))
    return parts


def _features(config: TrainConfig, entry: HubDataset | None = None) -> Features:
    names = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")
    return Features(*(getattr(entry, name, None) or getattr(config, name) for name in names))


def _part(source: Source, features: Features, config: TrainConfig) -> Part:
    """The source with the kind of its rows."""
    sample = list(islice(source.rows, SAMPLE))
    if not sample:
        raise EdgeLoraError(f"{source.name}: has no rows, expected at least one")
    features = Features() if source.is_text else features
    rows = [row for _, row in sample]
    try:
        kind = find_kind(rows, features, config.data_format, config.system_prompt)
    except RowError as error:
        raise EdgeLoraError(f"{source.row_name} {sample[0][0]}: {error}") from error
    return Part(source, kind, None, source.name)


def _split_off(parts: _Parts, config: TrainConfig) -> _Parts:
    """Give a share of the training rows, drawn by the seed, to the set that is missing."""
    share, name = config.val_split, "val_split"
    if parts["valid"]:
        raise EdgeLoraError(
            f"{name}: got {share}, but the data has a valid set, {parts['valid'][0].name}; leave "
            "one of them out"
        )
    train, valid = [], []
    random = np.random.RandomState(config.seed)
    for part in parts["train"]:
        count = sum(1 for _ in part.source.rows)
        taken = max(1, round(share * count))
        if taken >= count:
            raise EdgeLoraError(
                f"{part.name}: has {count} rows, too few to split {share:g} of them off; leave "
                f"{name} out, or add rows"
            )
        chosen = np.zeros(count, bool)
        chosen[random.permutation(count)[:taken]] = True
        train.append(part._replace(only=~chosen, name=f"{part.name} (without the valid set)"))
        told = f"{part.name} ({taken:,} of {count:,} rows, seed {config.seed})"
        valid.append(part._replace(only=chosen, name=told))
    return parts | {"train": train, "valid": valid}


def _told(parts: _Parts) -> str:
    """One line: which rows are which set, and of what kind they are."""
    by_kind: dict[str, list[str]] = {}
    for split, found in parts.items():
        for part in found:
            names = by_kind.setdefault(str(part.kind), [])
            names.append(f"{Path(part.name).name} for {PURPOSES[split]}")
    return "; ".join(f"{', '.join(names)}: {kind}" for kind, names in by_kind.items())


def _build(parts: Sequence[Part], config: TrainConfig, tokenizer: Any) -> Dataset:
    name = " + ".join(part.name for part in parts)
    encode = encoder(tokenizer, config.mask_prompt)
    rows = (row for part in parts for row in _encode(part, encode))
    dataset = Dataset(rows, config.max_seq_length, name)
    check_batch_size(dataset, config.batch_size)
    return dataset


def _encode(
    part: Part, encode: Callable[[CanonicalRow], tuple[list[int], int]]
) -> Iterator[Row]:
    """Tokenize row after row, so that no more than one is held as text."""
    for number, row in part.rows():
        try:
            tokens, offset = encode(row)
        except RowError as error:
            raise EdgeLoraError(f"{part.source.row_name} {number}: {error}") from error
        yield Row(part.source.row_name, number, tokens, offset)
