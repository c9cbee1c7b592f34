"""Data sets of the Hugging Face Hub."""

from collections.abc import Mapping
from typing import Any

from mlx_edgelora.config import HubDataset
from mlx_edgelora.data.sources import Source
from mlx_edgelora.data.tables import without_nulls
from mlx_edgelora.errors import EdgeLoraError


def hub_sources(name: str) -> dict[str, Source]:
    """The splits of a data set on the Hugging Face Hub, by name.

    Raises:
        EdgeLoraError: the package `datasets` is missing, or the data set cannot be loaded.
    """
    splits = _load_from_hub(f"data: {name!r}, no folder here,", name, {})
    return {split: _hub_source(f"{name} {split}", rows) for split, rows in splits.items()}


def hub_split_source(entry: HubDataset, split: str) -> Source:
    """The rows of one split expression (`train[:80%]`) of an entry of `hf_dataset`.

    Raises:
        EdgeLoraError: the package `datasets` is missing, or the data set cannot be loaded.
    """
    rows = _load_from_hub(f"hf_dataset: {entry.path!r}", entry.path, entry.config, split=split)
    return _hub_source(f"{entry.path} {split}", rows)


def _hub_source(name: str, rows: Any) -> Source:
    return Source(
        name,
        f"{name}: row",
        lambda: ((number, without_nulls(row)) for number, row in enumerate(rows, start=1)),
    )


def _load_from_hub(place: str, name: str, config: Mapping[str, Any], **split: str) -> Any:
    try:
        import datasets  # noqa: PLC0415, an optional package that is slow to import
    except ImportError as error:
        raise EdgeLoraError(
            f"{place} needs the package datasets to be loaded from the Hugging Face Hub; run "
            "`pip install datasets`, or give a folder"
        ) from error
    if config.get("trust_remote_code"):  # older versions run scripts of data sets
        raise EdgeLoraError(
            f"{place} has config.trust_remote_code, but code of a data set is never run; leave it "
            "out, or give a folder"
        )
    try:
        return datasets.load_dataset(name, **config, **split)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EdgeLoraError(
            f"{place} cannot be loaded from the Hugging Face Hub ({reason}); correct the name or "
            "the split, or give a folder"
        ) from error
