"""Read rows from JSONL files, JSON lists, and JSON objects that contain one list."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_edgelora.data.lines import ROW_LIMIT, decode, not_utf_8, open_data, read_lines, too_long
from mlx_edgelora.errors import EdgeLoraError

Rows = Iterator[tuple[int, Mapping[str, Any]]]

# Bytes that are read at once, and largest part of a first line that is examined.
CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
# An error this close to the end of the text may be a literal or an escape that is incomplete.
UNFINISHED = 16
# Keys of a row: a list of objects under one of them is not the list of rows.
PARTS = frozenset(
    ("messages", "conversations", "conversation", "tools", "functions", "prompt", "completion")
)


def is_document(path: Path, by_lines: bool) -> bool:
    """Whether a file is one JSON value, and not one object per line.

    Args:
        path: the file.
        by_lines: whether its name is that of a JSONL file; then only a list is a document.

    Raises:
        EdgeLoraError: the file cannot be read.
    """
    with open_data(path) as file:
        lines = (line for line in iter(lambda: file.readline(CHUNK), b"") if line.strip())
        first = next(lines, b"").removeprefix(codecs.BOM_UTF8).strip()
        if first.startswith(b"["):
            return True
        if by_lines or not first.startswith(b"{"):
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return True
        return not next(lines, b"").lstrip().startswith(b"{")


def read_json_lines(path: Path) -> Rows:
    """The objects of a JSONL file with their line numbers; blank lines are skipped.

    Raises:
        EdgeLoraError: a line is not a JSON object; the message names the file and line.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, _parse_line(f"{path}: line {number}", line)


def _parse_line(place: str, line: bytes) -> Mapping[str, Any]:
    text = decode(place, line).rstrip()
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise EdgeLoraError(
            f"{place}: is not JSON ({_reason(error)} at column {error.colno}), expected one object "
            "per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _not_parsed(place, error) from error
    return _checked(place, row, text)


def read_document(path: Path) -> Rows:
    """The objects of a JSON list, or of the list in an object, with their numbers from 1.

    One row and the chunk of the file that contains it are in memory.

    Raises:
        EdgeLoraError: the file is no such document; the message names the file and line.
    """
    with open_data(path) as file:
        scanner = _Scanner(path, file)
        rows = _elements(scanner) if scanner.peek() == "[" else _objects(scanner)
        for number, (row, text) in enumerate(rows, start=1):
            yield number, _checked(f"{path}: row {number}", row, text)


class _KeyTwiceError(ValueError):
    """An object has the same key twice."""


class _Scanner:
    """Reads consecutive JSON values of a file, with one of them in memory at a time."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(object_pairs_hook=_unique)
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no whitespace; empty at the end of the file."""
        while True:
            self._move(SPACE.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, expected: str) -> str:
        """Consume the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            got = repr(found) if found else "the end of the file"
            wanted = " or ".join(map(repr, expected))
            raise EdgeLoraError(f"{self.place()}: is not JSON (got {got}, expected {wanted})")
        self._move(self._at + 1)
        return found

    def value(self) -> tuple[Any, str]:
        """The next value and its text."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._read():
                    continue
                line = self._line + self._text.count("\n", self._at, error.pos)
                raise EdgeLoraError(
                    f"{self._path}: line {line}: is not JSON ({_reason(error)}); "
                    "correct it, or write one object per line into a .jsonl file"
                ) from error
            except (ValueError, RecursionError) as error:
                raise _not_parsed(self.place(), error) from error
            if end < len(self._text) or not self._read():  # a number may continue in the next chunk
                text = self._text[self._at : end]
                self._move(end)
                return value, text

    def place(self) -> str:
        """The current file and line, for error messages."""
        return f"{self._path}: line {self._line}"

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        is_cut = error.pos >= len(self._text) - UNFINISHED
        return is_cut or error.msg.startswith("Unterminated string")

    def _move(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _read(self) -> bool:
        """Read more, doubling the text of an incomplete row; false at the end of the file."""
        left = len(self._text) - self._at
        if left > ROW_LIMIT:
            raise too_long(f"{self.place()}: the row that begins here")
        chunk = self._file.read(max(CHUNK, left))
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            before = self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            place = f"{self._path}: line {self._line + before}"
            raise not_utf_8(place, error.object, error) from error
        if not chunk:
            return False
        self._text, self._at = self._text[self._at :] + text, 0
        return True


def _elements(scanner: _Scanner) -> Iterator[tuple[Any, str]]:
    """The elements of a list that is the whole file."""
    scanner.take("[")
    yield from _rest_of_list(scanner)
    _end(scanner, "its list of rows")


def _rest_of_list(scanner: _Scanner) -> Iterator[tuple[Any, str]]:
    if scanner.peek() == "]":
        scanner.take("]")
        return
    while True:
        yield scanner.value()
        if scanner.take(",]") == "]":
            return


def _objects(scanner: _Scanner) -> Iterator[tuple[Any, str]]:
    """The rows in the only list of an object, or objects that are rows themselves."""
    if scanner.peek() != "{":
        yield scanner.value()
        return
    fields: dict[str, Any] = {}
    found = None
    for key in _keys(scanner):
        if scanner.peek() != "[" or key in PARTS:
            fields[key], _ = scanner.value()
            continue
        scanner.take("[")
        if scanner.peek() != "{":
            fields[key] = [value for value, _ in _rest_of_list(scanner)]
            continue
        if found is not None:
            raise EdgeLoraError(
                f"{scanner.place()}: holds two lists of rows, {found!r} and {key!r}; write a file "
                "of each"
            )
        found = key
        yield from _rest_of_list(scanner)
    if found is not None:
        _end(scanner, "the object around its rows")
        return
    yield fields, json.dumps(fields)
    while scanner.peek():
        yield scanner.value()


def _keys(scanner: _Scanner) -> Iterator[str]:
    """The keys of an object; the caller must read the value after each key."""
    scanner.take("{")
    if scanner.peek() == "}":
        scanner.take("}")
        return
    while True:
        scanner.peek()
        place = scanner.place()
        key, _ = scanner.value()
        if not isinstance(key, str):
            raise EdgeLoraError(f"{place}: is not JSON (got {key!r}, expected a key in quotes)")
        scanner.take(":")
        yield key
        if scanner.take(",}") == "}":
            return


def _end(scanner: _Scanner, what: str) -> None:
    if found := scanner.peek():
        raise EdgeLoraError(f"{scanner.place()}: got {found!r} after {what}, expected nothing more")


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # the caller adds the column


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _KeyTwiceError(twice)
    return result


def _not_parsed(place: str, error: Exception) -> EdgeLoraError:
    """The error for a number with thousands of digits, a repeated key, or deep nesting."""
    if isinstance(error, RecursionError):
        return EdgeLoraError(f"{place}: is nested too deeply, expected a JSON object")
    if isinstance(error, _KeyTwiceError):
        return EdgeLoraError(f"{place}: has the key {str(error)!r} twice; keep one of them")
    return EdgeLoraError(f"{place}: is not JSON ({error}), expected an object")


def _checked(place: str, row: Any, text: str) -> Mapping[str, Any]:
    if "\\ud" in text.lower() and not _is_unicode(row):
        raise EdgeLoraError(
            f"{place}: holds half of a surrogate pair, such as \\ud800, which is no character; "
            "take it out"
        )
    if not isinstance(row, dict):
        raise EdgeLoraError(
            f"{place}: got a JSON {type(row).__name__}, expected an object such as "
            '{"prompt": "...", "completion": "..."}'
        )
    return row


def _is_unicode(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
