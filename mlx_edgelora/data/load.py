"""From a run's options to its tokenized train, valid and test sets."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_edgelora.config import HubDataset, TrainConfig
from mlx_edgelora.data.dataset import Dataset, Row
from mlx_edgelora.data.formats import Features, RowError, find_encoder
from mlx_edgelora.data.sources import Source, hub_sources, hub_split_source, jsonl_source
from mlx_edgelora.errors import EdgeLoraError


def load_datasets(
    config: TrainConfig, tokenizer: Any
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The train, valid and test sets that a run needs, tokenized and checked.

    Args:
        config: `hf_dataset` wins over `data`, which is a folder of JSONL files or a name on
            the Hugging Face Hub. Train and valid sets are read if `train` is true, the test set
            if `test` is.
        tokenizer: as `mlx_lm.load` returns it.

    Returns:
        Three data sets; None for one that the run does not need, and for a valid set that
        does not exist. Print `dataset.report.warning()` of each.

    Raises:
        EdgeLoraError: a data set that is missing, cannot be read, holds a bad row (named by
            file and line) or has no usable row.
    """
    train, valid, test = _find_sources(config)
    needed = (
        (train, "train", config.train),
        (valid, "valid", config.train and config.val_batches != 0),
        (test, "test", config.test),
    )
    result = []
    for sources, split, wanted in needed:
        if not wanted or (split == "valid" and not sources):
            result.append(None)
            continue
        if not sources:
            raise EdgeLoraError(
                f"data: {config.data} has no {split} set, expected {split}.jsonl in the folder or "
                "a split of that name on the Hub"
            )
        result.append(_build(sources, config, tokenizer))
    return tuple(result)


_Sources = list[tuple[Source, Features]]


def _find_sources(config: TrainConfig) -> tuple[_Sources, _Sources, _Sources]:
    if config.hf_dataset is not None:
        return _find_hub_splits(config, config.hf_dataset)
    if config.data is None:
        raise EdgeLoraError("data: got nothing, expected a folder or a Hugging Face name")
    features = _features(config)
    folder = Path(config.data)
    if os.path.isdir(folder):  # unlike Path's, false instead of an error without permission
        files = [folder / f"{split}.jsonl" for split in ("train", "valid", "test")]
        return tuple([(jsonl_source(file), features)] if file.exists() else [] for file in files)
    if os.path.exists(folder):
        raise EdgeLoraError(f"data: {config.data} is a file, expected the folder it is in")
    if folder.is_absolute() or config.data.startswith((".", "~")) or len(folder.parts) > 2:
        raise EdgeLoraError(
            f"data: {config.data} does not exist, expected a folder with train.jsonl"
        )
    splits = hub_sources(config.data)
    return tuple(
        [(splits[split], features)] if split in splits else []
        for split in ("train", "valid", "test")
    )


def _find_hub_splits(
    config: TrainConfig, entries: Sequence[HubDataset]
) -> tuple[_Sources, _Sources, _Sources]:
    """As mlx-lm: several entries are one data set, in their order."""
    train, valid, test = [], [], []
    for entry in entries:
        features = _features(config, entry)
        if config.train:
            train.append((hub_split_source(entry, entry.train_split), features))
            if config.val_batches != 0:
                valid.append((hub_split_source(entry, entry.valid_split), features))
        if config.test:
            if entry.test_split is None:
                raise EdgeLoraError(
                    f"hf_dataset.test_split: missing for {entry.path}, expected rows to test on "
                    "such as test[:100]"
                )
            test.append((hub_split_source(entry, entry.test_split), features))
    return train, valid, test


def _features(config: TrainConfig, entry: HubDataset | None = None) -> Features:
    names = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")
    return Features(*(getattr(entry, name, None) or getattr(config, name) for name in names))


def _build(sources: _Sources, config: TrainConfig, tokenizer: Any) -> Dataset:
    name = " + ".join(source.name for source, _ in sources)
    rows = (
        row
        for source, features in sources
        for row in _encode(source, features, tokenizer, config.mask_prompt)
    )
    return Dataset(rows, config.max_seq_length, name)


def _encode(source: Source, features: Features, tokenizer: Any, mask_prompt: bool) -> Iterator[Row]:
    """Tokenize row after row, so that no more than one is held as text."""
    encode = None
    for number, row in source.rows:
        try:
            encode = encode or find_encoder(row, tokenizer, features, mask_prompt)
            tokens, offset = encode(row)
        except RowError as error:
            raise EdgeLoraError(f"{source.row_name} {number}: {error}") from error
        yield Row(source.row_name, number, tokens, offset)
    if encode is None:
        raise EdgeLoraError(f"{source.name}: has no rows, expected at least one")
