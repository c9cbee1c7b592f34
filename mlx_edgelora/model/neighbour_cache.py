"""The nearest tokens of those that occur as labels, computed once and kept in a mapped file.

One file for a head and a k: a header that names both, the sum of the head's rows, and a slot
for every token of the vocabulary, k int32 and their CRC. The file is sparse: slots never
written take no space. A slot whose CRC is wrong (never written, torn by a crash, damaged) is
a slot that is not there, so a build that was interrupted goes on where it stopped.
"""

import hashlib
import mmap
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
from mlx_edgelora.model.safetensors import to_numpy

MAGIC = b"MELNEAR1"
# magic, vocabulary, k, width, digest of the head
HEADER = struct.Struct("<8sQQQ32s")
# Of the head read at a time for its digest.
DIGEST_ROWS = 4096


class NeighbourCache:
    """Nearest tokens by token, on disk.

    Args:
        folder: of such files; made if need be.
        head: the head whose rows are compared, without its adapter.
        k: tokens kept per token, from 1 to the vocabulary.
        notify: told why a file is made anew.

    Raises:
        EdgeLoraError: the folder or file cannot be written, or k does not fit.
    """

    def __init__(
        self, folder: Path, head: Head, k: int, notify: Callable[[str], None] = lambda text: None
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
        size = self._slots_at + 4 * (k + 1) * head.vocabulary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if wrong := self._whats_wrong(header, size):
                if self.path.exists():
                    notify(f"{self.path}: {wrong}; it is built anew")
                self._create(header, size)
            self._file = open(self.path, "r+b")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._slots = np.memmap(self._file, np.int32, "r", self._slots_at, (head.vocabulary, k + 1))

    def build(
        self, tokens: np.ndarray, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Compute what is missing of some tokens; each few hundred are on disk before the next.

        Args:
            tokens: int [n].
            advance: told how many more are done.

        Raises:
            EdgeLoraError: the disk is full.
        """
        tokens = np.unique(tokens)
        there = self._valid(tokens)
        advance(int(there.sum()))
        missing = tokens[~there]
        for start in range(0, len(missing), QUERIES):
            some = missing[start : start + QUERIES]
            near = to_numpy(nearest(self._head, mx.array(some), self._k))
            self._write(
                [(self._slot_at(t), _sealed(row)) for t, row in zip(some, near, strict=True)]
            )
            advance(len(some))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """The k nearest of each of some tokens, int32 [m, k]; what is missing is computed."""
        if not self._valid(tokens).all():
            self.build(tokens)
        rows = self._slots[tokens, : self._k]
        self._drop_pages()
        return rows

    def row_sum(self) -> Tile:
        """The sum of the head's rows, computed once."""
        width = self._head.dims + 1
        values = np.frombuffer(self._read(self._sum_at, 4 * (width + 1)), np.float32)
        if not _is_sealed(values.view(np.int32)):
            total = row_sum(self._head)
            bias = mx.zeros((1,)) if total.bias is None else total.bias
            values = to_numpy(mx.concatenate([total.weight[0], bias]))
            self._write([(self._sum_at, _sealed(values.view(np.int32)))])
        bias = mx.array(values[width - 1 : width])
        return Tile(mx.array(values[None, : width - 1]), bias)

    def close(self) -> None:
        """Close the file."""
        self._slots = None
        self._file.close()

    def _whats_wrong(self, header: bytes, size: int) -> str | None:
        try:
            with open(self.path, "rb") as file:
                found = file.read(HEADER.size)
                length = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return "not there"
        if found != header:
            return "belongs to another model, or another k"
        return None if length == size else f"{length} bytes long, expected {size}"

    def _create(self, header: bytes, size: int) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(header)
                file.truncate(size)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _slot_at(self, token: int) -> int:
        return self._slots_at + 4 * (self._k + 1) * int(token)

    def _read(self, at: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, at)

    def _write(self, pieces: list[tuple[int, bytes]]) -> None:
        # Written, not stored through the mapping: a full disk is an error then, not SIGBUS.
        try:
            for at, data in pieces:
                os.pwrite(self._file.fileno(), data, at)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _valid(self, tokens: np.ndarray) -> np.ndarray:
        return np.array([_is_sealed(self._slots[token]) for token in tokens], bool)

    def _drop_pages(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._slots._mmap.madvise(mmap.MADV_DONTNEED)


def head_digest(head: Head) -> bytes:
    """SHA-256 of a head's rows as they are kept; reads them all, tile by tile."""
    digest = hashlib.sha256(f"{head.vocabulary} {head.dims}".encode())
    for start in range(0, head.vocabulary, DIGEST_ROWS):
        rows = head.slice(start, min(start + DIGEST_ROWS, head.vocabulary))
        for name, array in sorted(rows.items()):
            dense = mx.contiguous(array)
            mx.eval(dense)
            digest.update(f"{name} {dense.dtype} {dense.shape}".encode())
            digest.update(memoryview(to_numpy(dense)).cast("B"))
    return digest.digest()


def _cannot_write(path: Path, error: OSError) -> EdgeLoraError:
    return EdgeLoraError(
        f"{path}: cannot be written ({error.strerror}); free some space or choose another folder "
        "with --cache-dir"
    )


def _sealed(row: np.ndarray) -> bytes:
    data = np.ascontiguousarray(row).tobytes()
    return data + struct.pack("<I", zlib.crc32(data))


def _is_sealed(row: np.ndarray) -> bool:
    return zlib.crc32(row[:-1].tobytes()) == int(row[-1]) & 0xFFFFFFFF
