"""A model of the Hub without its weights: its configuration and the headers of its shards.

Each shard is created as a sparse file with the original header and length, which takes no disk
space. For code that only uses shapes there is no difference.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import HUB_PATTERNS, error_text, resolve_model

SMALL = [pattern for pattern in HUB_PATTERNS if not pattern.endswith("safetensors")]
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
FORMAT_ERRORS = (NotASafetensorsRepoError, SafetensorsParsingError)


@contextmanager
def headers_of(name: str) -> Iterator[Path]:
    """The folder of a model if it is on this machine, else a folder with headers only.

    Raises:
        EdgeLoraError: it is neither a folder nor a repository that can be reached.
    """
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        yield resolve_model(name)
        return
    if (found := _downloaded(name)) is not None:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="mlx_edgelora-") as folder:
        _fetch(name, Path(folder))
        yield Path(folder)


def _downloaded(name: str) -> Path | None:
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=HUB_PATTERNS, local_files_only=True
        )
    except (LocalEntryNotFoundError, OSError, HFValidationError):
        return None
    # Only the small files are there after `_fetch`, which some versions of the library allow.
    return Path(found) if any(Path(found).glob("*.safetensors")) else None


def _fetch(name: str, folder: Path) -> None:
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=SMALL)
        shards = huggingface_hub.get_safetensors_metadata(name).files_metadata
    except (*HUB_ERRORS, *FORMAT_ERRORS) as error:
        raise EdgeLoraError(
            f"model: {name!r} is not a folder here and cannot be read from the Hub "
            f"({error_text(error)}); check the name, the network and the access rights"
        ) from error
    for file in Path(found).iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)
    for shard, metadata in shards.items():
        entries = {
            tensor: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            for tensor, info in metadata.tensors.items()
        }
        text = json.dumps(entries).encode()
        size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        with open(folder / Path(shard).name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + size)
