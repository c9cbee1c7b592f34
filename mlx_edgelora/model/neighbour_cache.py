"""The nearest tokens of the labels, computed once and kept in a file.

There is one file for each head and k. It has a header that identifies both, the sum of the head's
rows, and a slot for every token of the vocabulary with k int32 and their CRC. The file is sparse:
unwritten slots take no space. A slot with a wrong CRC (unwritten, damaged, or torn by a crash)
counts as missing, so an interrupted build continues later. Several processes may fill a file at
once: they write the same values, except for ties.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.head import Head, Tile
from mlx_edgelora.losses.neighbours import QUERIES, nearest, row_sum
from mlx_edgelora.storage.device_memory import to_numpy
from mlx_edgelora.storage.temporaries import (
    create,
    mark_used,
    remove_left_overs,
    temporary_name,
)

MAGIC = b"MELNEAR1"
# magic, vocabulary, k, width, digest of the head
HEADER = struct.Struct("<8sQQQ32s")
# Bytes of slots read, and of rows of the head digested, at a time.
SLOTS_BYTES = 16 * 2**20
DIGEST_BYTES = 16 * 2**20


class NeighbourCache:
    """Nearest tokens by token, on disk.

    Args:
        folder: folder of such files; created if missing.
        head: the head whose rows are compared, without its adapter.
        k: number of nearest tokens per token, from 1 to the vocabulary.
        log: called with the reason if a file is rebuilt.

    Raises:
        EdgeLoraError: the folder or file cannot be written, or k does not fit.
    """

    def __init__(
        self, folder: Path, head: Head, k: int, log: Callable[[str], None] = lambda text: None
    ) -> None:
        if not 1 <= k <= head.vocabulary:
            raise EdgeLoraError(
                f"loss_k: got {k}, expected 1 to {head.vocabulary}, the size of the vocabulary"
            )
        self._head, self._k = head, k
        digest = head_digest(head)
        self.path = folder / f"neighbours-{digest.hex()[:16]}-k{k}.bin"
        header = HEADER.pack(MAGIC, head.vocabulary, k, head.dims, digest)
        self._sum_at = HEADER.size
        self._slots_at = self._sum_at + 4 * (head.dims + 2)
        self._at_once = max(1, min(QUERIES, SLOTS_BYTES // (4 * (k + 1))))
        size = self._slots_at + 4 * (k + 1) * head.vocabulary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if wrong := self._find_problem(header, size):
                if self.path.exists():
                    log(f"{self.path}: {wrong}; it is rebuilt")
                self._create(header, size)
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - closed by `close`
            self._used = mark_used(self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def missing(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens, among int [n], that are not computed yet: sorted, each once."""
        tokens = np.unique(tokens)
        parts = [tokens[:0]]
        for start in range(0, len(tokens), self._at_once):
            some = tokens[start : start + self._at_once]
            parts.append(some[~self._looked_up(some)[1]])
        return np.concatenate(parts)

    def build(
        self, tokens: np.ndarray, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Compute the missing ones of some tokens, and write them a few hundred at a time.

        Args:
            tokens: int [n].
            advance: called with the number of tokens written.

        Raises:
            EdgeLoraError: the disk is full.
        """
        missing = self.missing(tokens)
        for start in range(0, len(missing), self._at_once):
            some = missing[start : start + self._at_once]
            near = to_numpy(nearest(self._head, mx.array(some), self._k))
            for token, row in zip(some, near, strict=True):
                self._write(self._slots_at + 4 * (self._k + 1) * int(token), _with_checksum(row))
            advance(len(some))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """The k nearest of each token, int32 [m, k]; missing ones are computed."""
        near, there = self._looked_up(tokens)
        if not there.all():
            self.build(tokens[~there])
            near, there = self._looked_up(tokens)
        if not there.all():
            raise EdgeLoraError(
                f"{self.path}: the bytes read are not those that were written; choose a folder on "
                "another volume with --cache-dir"
            )
        return near

    def row_sum(self) -> Tile:
        """The sum of the head's rows, computed once."""
        width = self._head.dims + 1
        values = np.frombuffer(self._read(self._sum_at, 4 * (width + 1)), np.float32)
        if not _has_checksum(values.view(np.int32)):
            total = row_sum(self._head)
            bias = mx.zeros((1,)) if total.bias is None else total.bias
            values = to_numpy(mx.concatenate([total.weight[0], bias]))
            self._write(self._sum_at, _with_checksum(values.view(np.int32)))
        bias = mx.array(values[width - 1 : width])
        return Tile(mx.array(values[None, : width - 1]), bias)

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            os.close(self._used)
        self._file.close()

    def _find_problem(self, header: bytes, size: int) -> str | None:
        try:
            with open(self.path, "rb") as file:
                found = file.read(HEADER.size)
                length = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return "missing"
        if found != header[: len(found)]:
            return "belongs to another model, or another k"
        return None if length == size else f"{length} bytes long, expected {size}"

    def _create(self, header: bytes, size: int) -> None:
        temporary = temporary_name(self.path)
        remove_left_overs(self.path.parent, self.path.name)
        try:
            with create(temporary) as file:
                file.write(header)
                file.truncate(size)
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _looked_up(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The contents of the slots, int32 [m, k], and whether they are valid, bool [m]."""
        outside = tokens[(tokens < 0) | (tokens >= self._head.vocabulary)]
        if outside.size:
            raise ValueError(
                f"token: got {outside[0]}, expected 0 to {self._head.vocabulary - 1}, the "
                "vocabulary of the head"
            )
        # Not mapped: reading a hole of a mapped file in memory (tmpfs) takes a page, and if there
        # is none left, the system ends the process.
        slots = np.zeros((len(tokens), self._k + 1), np.int32)  # of zeros, no checksum is right
        for token, slot in zip(tokens, slots, strict=True):
            data = self._read(self._slots_at + slot.nbytes * int(token), slot.nbytes)
            if len(data) == slot.nbytes:
                slot[:] = np.frombuffer(data, np.int32)
        near = slots[:, : self._k]
        there = np.array([_has_checksum(slot) for slot in slots], bool)
        # A valid checksum in the wrong slot is an error as well.
        there &= (near[:, 0] == tokens) & (near >= 0).all(axis=1)
        return near, there & (near < self._head.vocabulary).all(axis=1)

    def _read(self, at: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, at)

    def _write(self, at: int, data: bytes) -> None:
        # Not written through the mapping, where a full disk would be SIGBUS instead of an error.
        try:
            while data:  # a disk that gets full may accept a part without an error
                count = os.pwrite(self._file.fileno(), data, at)
                at, data = at + count, data[count:]
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def head_digest(head: Head) -> bytes:
    """SHA-256 of a head's rows as they are stored; reads all of them, tile by tile."""
    digest = hashlib.sha256(f"{head.vocabulary} {head.dims}".encode())
    step = max(1, DIGEST_BYTES // (4 * head.dims))
    for start in range(0, head.vocabulary, step):
        rows = head.slice(start, min(start + step, head.vocabulary))
        for name, array in sorted(rows.items()):
            dense = mx.contiguous(array)
            mx.eval(dense)
            digest.update(f"{name} {dense.dtype} {dense.shape}".encode())
            digest.update(memoryview(to_numpy(dense)).cast("B"))
        del rows, array, dense
    return digest.digest()


def _cannot_write(path: Path, error: OSError) -> EdgeLoraError:
    return EdgeLoraError(
        f"{path}: cannot be written ({error.strerror}); free some space or choose another folder "
        "with --cache-dir"
    )


def _with_checksum(row: np.ndarray) -> bytes:
    data = np.ascontiguousarray(row).tobytes()
    return data + struct.pack("<I", zlib.crc32(data))


def _has_checksum(row: np.ndarray) -> bool:
    return zlib.crc32(row[:-1].tobytes()) == int(row[-1]) & 0xFFFFFFFF
