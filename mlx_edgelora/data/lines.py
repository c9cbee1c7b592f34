"""Lines of a data file as bytes, compressed or not, and as text."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mlx_edgelora.errors import EdgeLoraError

# A row is read whole; one of more bytes is a mistake, not a text.
ROW_LIMIT = 100_000_000
LIMIT = "100 MB"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UTF_8_MARK = b"\xef\xbb\xbf"


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, uncompressed if its name ends with .gz.

    Raises:
        EdgeLoraError: what cannot be read or uncompressed, here and while the file is read.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise EdgeLoraError(
            f"{path}: cannot be uncompressed ({error}); compress or download it again"
        ) from error
    except OSError as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; a line costs its own bytes and no more than `ROW_LIMIT`."""
    with open_data(path) as file:
        number = 0
        while line := file.readline(ROW_LIMIT + 1):
            number += 1
            if len(line) > ROW_LIMIT:
                raise too_long(f"{path}: line {number}")
            yield number, line.removeprefix(UTF_8_MARK) if number == 1 else line


def decode(place: str, line: bytes) -> str:
    """The text of a line; raises `EdgeLoraError` where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf_8(place, line, error) from error


def not_utf_8(place: str, start: bytes, error: UnicodeDecodeError) -> EdgeLoraError:
    """The error for bytes that are no text; `start` may show what else they are."""
    reason = (
        "it begins like UTF-16"
        if start.startswith(UTF_16)
        else f"byte 0x{error.object[error.start]:02x}, as in Latin-1 or a binary file"
    )
    return EdgeLoraError(f"{place}: is not UTF-8 text ({reason}); save the file as UTF-8")


def too_long(place: str) -> EdgeLoraError:
    """The error for a row that is larger than any text."""
    return EdgeLoraError(
        f"{place}: is longer than {LIMIT}, the limit of a row; split it into several"
    )
