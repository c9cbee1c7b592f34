"""Compare the contents of a model's shards with hashes that were recorded elsewhere.

Headers and sizes are checked whenever a model is opened; a changed bit in the data is only seen by
a hash of all bytes. The Hub names each large file by its SHA-256, which its clients keep beside the
download.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import read_checkpoint

# A file of lines `HASH  NAME` in the model's folder, as sha256sum writes it.
SUMS = "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardHash:
    """The hash of a shard.

    Attributes:
        name: name of the file.
        found: its SHA-256 in hexadecimal.
        expected: the recorded one; None if there is none.
        source: where it was recorded.
    """

    name: str
    found: str
    expected: str | None
    source: str

    @property
    def is_damaged(self) -> bool:
        """Whether the shard is not what was recorded."""
        return self.expected is not None and self.found != self.expected


def hash_shards(folder: Path) -> Iterator[ShardHash]:
    """Hash the shards of a model one by one. Reads each once; memory: 1 MB.

    Raises:
        EdgeLoraError: a shard cannot be read, or its header or size is wrong.
    """
    tensors = read_checkpoint(folder).tensors
    for shard in sorted({shard for shard, _ in tensors.values()}):
        expected, source = _recorded(shard)
        yield ShardHash(shard.name, _sha256(shard), expected, source)


def _recorded(shard: Path) -> tuple[str | None, str]:
    """The recorded SHA-256 of a shard, and where it is recorded."""
    try:
        lines = (shard.parent / SUMS).read_text("utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        digest, _, name = line.partition(" ")
        if name.lstrip(" *") == shard.name and _SHA256.fullmatch(digest.lower()):
            return digest.lower(), SUMS
    blob = shard.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name, "the cache of the Hub"
    # Of a download into a folder: the revision, the hash and the time, a line each.
    metadata = shard.parent / ".cache/huggingface/download" / f"{shard.name}.metadata"
    try:
        digest = metadata.read_text("utf-8").splitlines()[1].strip()
    except (OSError, ValueError, IndexError):
        digest = ""
    return (digest, "the download") if _SHA256.fullmatch(digest) else (None, "")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
