"""Read and decode lines of data files, which may be compressed."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mlx_edgelora.errors import EdgeLoraError

# Largest size of a row in bytes. Rows are read whole, and a larger one is an error.
ROW_LIMIT = 100_000_000
LIMIT = "100 MB"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UTF_8_MARK = b"\xef\xbb\xbf"


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, uncompressed if its name ends with .gz.

    Raises:
        EdgeLoraError: the file cannot be read or uncompressed, on opening or within the context.
    """
    try:
        if path.is_fifo() or path.is_char_device():  # would wait, and can be read only once
            raise EdgeLoraError(f"{path}: is a pipe or device, expected a file of rows")
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise EdgeLoraError(
            f"{path}: cannot be uncompressed ({error}); compress or download it again"
        ) from error
    except OSError as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file with their numbers from 1, one in memory at a time.

    Raises:
        EdgeLoraError: the file cannot be read, or a line is longer than `ROW_LIMIT`.
    """
    with open_data(path) as file:
        number = 0
        while line := file.readline(ROW_LIMIT + 1):
            number += 1
            if len(line) > ROW_LIMIT:
                raise too_long(f"{path}: line {number}")
            yield number, line.removeprefix(UTF_8_MARK) if number == 1 else line


def decode(place: str, line: bytes) -> str:
    """The text of a line; raises `EdgeLoraError` if it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf_8(place, line, error) from error


def not_utf_8(place: str, start: bytes, error: UnicodeDecodeError) -> EdgeLoraError:
    """The error for bytes that are not UTF-8; `start`, the first bytes, may reveal UTF-16."""
    reason = (
        "it begins like UTF-16"
        if start.startswith(UTF_16)
        else f"byte 0x{error.object[error.start]:02x}, as in Latin-1 or a binary file"
    )
    return EdgeLoraError(f"{place}: is not UTF-8 text ({reason}); save the file as UTF-8")


def too_long(place: str) -> EdgeLoraError:
    """The error for a row that is larger than `ROW_LIMIT`."""
    return EdgeLoraError(
        f"{place}: is longer than {LIMIT}, the limit of a row; split it into several"
    )
