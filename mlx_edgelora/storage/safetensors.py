"""Safetensors files: validated, read by rows, and written tensor by tensor.

`mx.load` accepts overlapping offsets, trailing bytes and invalid headers, and reads whole tensors.
Here a file is validated before it is used, and single rows of a matrix can be read (an embedding's
rows, a tile of the head). Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError, shortened, shown
from mlx_edgelora.storage.device_memory import Part, device_memory, to_numpy, unreadable
from mlx_edgelora.storage.files import WatchedFiles

# Limits of a header, in time and memory to read it; shards of the largest models have some 100 kB.
# The reference implementation takes 100 MB, for which Python needs gigabytes.
MAX_HEADER_BYTES, MAX_TENSORS = 25_000_000, 200_000
# Limits of MLX, whose dimensions have 32 bits.
MAX_DIMENSIONS, MAX_DIMENSION = 32, 2**31 - 1

# name in the file -> (MLX dtype, NumPy dtype of the same width)
DTYPES: Mapping[str, tuple[mx.Dtype, type]] = {
    "BOOL": (mx.bool_, np.uint8),
    "U8": (mx.uint8, np.uint8),
    "I8": (mx.int8, np.int8),
    "U16": (mx.uint16, np.uint16),
    "I16": (mx.int16, np.int16),
    "F16": (mx.float16, np.float16),
    "BF16": (mx.bfloat16, np.uint16),
    "U32": (mx.uint32, np.uint32),
    "I32": (mx.int32, np.int32),
    "F32": (mx.float32, np.float32),
    "U64": (mx.uint64, np.uint64),
    "I64": (mx.int64, np.int64),
    "F8_E4M3": (mx.uint8, np.uint8),
}
# The checksum is computed with zeros in its own place.
_CHECKSUM, _NO_CHECKSUM = "sha256", "0" * 64
_PROGRAM = "mlx_edgelora"
_CHECKSUM_ENTRY = b'"sha256": "'
NAMES = {dtype: name for name, (dtype, _) in DTYPES.items() if name != "F8_E4M3"}


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: `start` and `stop` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Read and validate the header of a safetensors file.

    Returns:
        Every tensor's dtype name, shape and absolute byte range, in file order.

    Raises:
        EdgeLoraError: the file is missing, truncated, or its header does not
            describe exactly the bytes that follow it.
    """
    path = Path(path)
    try:
        if path.is_fifo():  # would wait for a writer
            raise EdgeLoraError(f"{path}: is a pipe, expected a safetensors file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _parse_header(path, file, size)
    except OSError as error:
        raise EdgeLoraError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


def _parse_header(path: Path, file: BinaryIO, size: int) -> dict[str, TensorInfo]:
    if size < 8:
        raise _damaged(path, f"{size} bytes long, expected at least 8")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise _damaged(path, f"its header claims {length} bytes, the file has {size - 8} after it")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header has {length} bytes, expected at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata is not a mapping of names to texts")
    if len(header) > MAX_TENSORS:
        raise _damaged(path, f"it has {len(header)} tensors, expected at most {MAX_TENSORS}")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    at = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            raise _damaged(path, f"tensor {name!r} starts at byte {info.start}, expected {at}")
        at = info.stop
    if at != size:
        raise _damaged(path, f"{size} bytes long, expected {at}")
    return tensors


def _tensor(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    name = shortened(name, 200)
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise EdgeLoraError(
            f"{path}: tensor {name!r} has dtype {shown(dtype)}, expected one of "
            f"{', '.join(DTYPES)}; convert the file with mlx_lm.convert"
        )
    if not isinstance(shape, list) or not all(_is_count(n) for n in [*shape, start, stop]):
        raise _damaged(path, f"tensor {name!r} has a shape or offsets that are not counts")
    expected = math.prod(shape) * np.dtype(DTYPES[dtype][1]).itemsize
    if stop - start != expected:
        raise _damaged(
            path, f"tensor {name!r} spans {stop - start} bytes, its shape needs {expected}"
        )
    if len(shape) > MAX_DIMENSIONS or any(n > MAX_DIMENSION for n in shape):
        raise _damaged(path, f"tensor {name!r} has a shape of {shown(shape)}")
    return TensorInfo(dtype, tuple(shape), base + start, base + stop)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(path: Path, what: str) -> EdgeLoraError:
    return EdgeLoraError(
        f"{path}: damaged safetensors file: {what}; download or write the file again"
    )


class RowReader:
    """Reads rows of a matrix in a safetensors file.

    Memory: only the rows that are read. The file is read and not mapped, so that its pages never
    count as the process's memory.

    Args:
        path: of the file.
        info: where the matrix is in it.
        files: watches the file, if it may be read again later.
    """

    def __init__(
        self, path: str | os.PathLike, info: TensorInfo, files: WatchedFiles | None = None
    ) -> None:
        self.dtype = DTYPES[info.dtype][0]
        self.shape = info.shape
        self.row_bytes = (info.stop - info.start) // max(info.shape[0], 1)
        self._path, self._files = Path(path), files
        self._start = info.start

    def take(self, indices: np.ndarray) -> mx.array:
        """Gather rows: `indices` int [n] -> [n, ...] in the file's dtype."""
        self._check(indices)
        out, view = self._allocate(len(indices))
        size = self.row_bytes
        places = [(index, view[at * size : (at + 1) * size]) for at, index in enumerate(indices)]
        self._fill(places)
        return out

    def slice(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop` -> [stop - start, ...] in the file's dtype."""
        self._check(np.array([start, stop - 1]) if start < stop else np.array([], int))
        out, view = self._allocate(stop - start)
        self._fill([(start, view)])
        return out

    def _check(self, indices: np.ndarray) -> None:
        # Bytes beyond the rows belong to other tensors and would be read as rows of this one.
        outside = indices[(indices < 0) | (indices >= self.shape[0])]
        if outside.size:
            raise EdgeLoraError(
                f"{self._path}: row {outside[0]} is outside of the tensor, which has "
                f"{self.shape[0]} rows; use the tokenizer of this model"
            )

    def _open(self) -> BinaryIO:
        if self._files is not None:
            self._files.check(self._path)
        try:
            return open(self._path, "rb", buffering=0)
        except OSError as error:
            raise unreadable(self._path, error) from error

    def _allocate(self, rows: int) -> tuple[mx.array, memoryview]:
        out = device_memory().empty((rows, *self.shape[1:]), self.dtype)
        return out, memoryview(to_numpy(out)).cast("B") if out.size else memoryview(b"")

    def _fill(self, places: Iterable[tuple[int, memoryview]]) -> None:
        """Read whole rows into memory: the first row, and the memory."""
        with self._open() as file:
            device_memory().fill(
                [
                    Part(self._path, file.fileno(), self._start + int(row) * self.row_bytes, view)
                    for row, view in places
                ]
            )


def write_tensors(
    file: BinaryIO,
    specs: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]],
    arrays: Iterable,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        file: opened for writing in binary; naming and syncing stay with the caller.
        specs: dtype and shape by name, in the order in which tensors come.
        arrays: yields the tensors in that order; each is evaluated, written and
            dropped before the next is drawn, so the cost is one tensor.
        metadata: kept in the header. If given, the header also holds a checksum of the whole
            file, which `verify_checksum` compares; the file is then written from its beginning
            and must be seekable.
    """
    entries = {"format": "mlx"}
    if metadata is not None:
        entries |= {"program": _PROGRAM} | dict(metadata) | {_CHECKSUM: _NO_CHECKSUM}
    header, at = {"__metadata__": entries}, 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.size
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    file.write(text)
    digest = hashlib.sha256(text)
    for array in _evaluate_each(arrays):
        data = memoryview(to_numpy(array)).cast("B") if array.size else b""
        if metadata is not None:
            digest.update(data)
        file.write(data)
        del array, data
    if metadata is not None:
        file.seek(text.index(_CHECKSUM_ENTRY) + len(_CHECKSUM_ENTRY))
        file.write(digest.hexdigest().encode())
        file.seek(0, os.SEEK_END)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors; empty if nothing.

    Raises:
        EdgeLoraError: as `read_header`.
    """
    read_header(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def verify_checksum(path: str | os.PathLike) -> bool:
    """Compare a file with the checksum in its header. Reads it once; memory: 1 MB.

    Returns:
        False if the header has no checksum, as in files of other programs.

    Raises:
        EdgeLoraError: the file is not what was written, or as `read_header`.
    """
    path = Path(path)
    read_header(path)
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(struct.unpack("<Q", start)[0])
        at = start.find(_CHECKSUM_ENTRY)
        if at < 0 and _PROGRAM.encode() in start:  # a changed bit in the checksum's own name
            raise _damaged(path, "its checksum is missing")
        if at < 0:
            return False
        at += len(_CHECKSUM_ENTRY)
        expected = start[at : at + len(_NO_CHECKSUM)]
        blank = start[:at] + _NO_CHECKSUM.encode() + start[at + len(_NO_CHECKSUM) :]
        digest = hashlib.sha256(blank)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest().encode() != expected:
        raise EdgeLoraError(
            f"{path}: damaged: its bytes are not those that were written (the checksum differs); "
            "use an earlier checkpoint, or write the file again"
        )
    return True


def _evaluate_each(arrays: Iterable) -> Iterator[mx.array]:
    for array in arrays:
        dense = mx.contiguous(array)
        del array
        mx.eval(dense)
        yield dense
        del dense
