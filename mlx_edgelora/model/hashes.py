"""Hashes of a model's weights: of all bytes, as recorded elsewhere, and of samples, to know it.

Headers and sizes are checked whenever a model is opened; a changed bit in the data is only seen by
a hash of all bytes. The Hub names each large file by its SHA-256, which its clients keep beside the
download. To tell one model from another, samples of its tensors are enough.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import read_checkpoint

# A file of lines `HASH  NAME` in the model's folder, as sha256sum writes it.
SUMS = "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of a fingerprint: number of tensors that are sampled, and bytes from the middle of each.
SAMPLES, SAMPLE_BYTES = 256, 4096


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


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of the names, dtypes and shapes of a model's tensors and of samples of their data.

    The same weights in other shards, or with another config.json, have the same fingerprint. Reads
    the headers and about 1 MB, whatever the size of the model.

    Raises:
        EdgeLoraError: a shard cannot be read, or its header or size is wrong.
    """
    tensors = read_checkpoint(folder).tensors
    names = sorted(tensors)
    digest = hashlib.sha256()
    for name in names:
        _, info = tensors[name]
        digest.update(repr((name, info.dtype, info.shape)).encode())
    for name in names[:: -(-len(names) // SAMPLES)]:
        shard, info = tensors[name]
        start = max(info.start, (info.start + info.stop - SAMPLE_BYTES) // 2)
        try:
            with shard.open("rb") as file:
                data = os.pread(file.fileno(), min(SAMPLE_BYTES, info.stop - start), start)
        except OSError as error:
            raise _unreadable(shard, error) from error
        digest.update(data)
    return digest.hexdigest()


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
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> EdgeLoraError:
    return EdgeLoraError(f"{path}: cannot be read ({error.strerror}); check the disk")
