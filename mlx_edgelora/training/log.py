"""The run's log: one JSON record a line, for plots and comparisons."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import cannot_write


class RunLog:
    """Appends records to a JSONL file, each on disk's way before the next step begins.

    Args:
        path: opened for appending, created where missing.

    Raises:
        EdgeLoraError: the file cannot be opened, or later written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        try:
            # Without a buffer, which would be written once more, and fail once more, at the end.
            self._file = open(self._path, "ab+", buffering=0)  # noqa: SIM115 - see close()
            # A run that was killed may have left half a record; do not glue ours to it.
            if self._file.tell() and not self._ends_a_line():
                self._file.write(b"\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, record: Mapping[str, int | float]) -> None:
        """Append one record and flush it.

        Raises:
            EdgeLoraError: a value is NaN or infinite, which JSON cannot hold, or the
                disk is full.
        """
        for key, value in record.items():
            if not math.isfinite(value):
                raise EdgeLoraError(
                    f"{self._path}: iteration {record['iteration']}: {key} is {value}, expected a "
                    "finite number; check the learning rate and its schedule"
                )
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _ends_a_line(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"
