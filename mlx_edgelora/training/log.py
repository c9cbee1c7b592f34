"""The run's log with one JSON record per line, and the report page made from it.

A report of a loss is one flat record (`LossReport.record`). Every other record has one key: `run`
(model, data, adapters, optimizer and options), `plan`, `step_memory`, `samples`, `test`, `answers`
or `end`. `mlx_edgelora/report` reads these records.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.report.page import check_target, write_report
from mlx_edgelora.storage.files import cannot_write
from mlx_edgelora.storage.temporaries import create_unnamed


class RunLog:
    """Appends records to a JSONL file; each is passed to the system before the next step.

    Args:
        path: the file, opened for appending and created if missing; None for a temporary file, in
            runs with a report page but without a log.

    Raises:
        EdgeLoraError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self._path = Path(tempfile.gettempdir() if path is None else path)
        self._begun = False
        try:
            if path is None:
                self._file = create_unnamed(self._path)
                return
            # Unbuffered: after a failed write, a buffer would be written again, and fail again,
            # when the file is closed.
            self._file = open(self._path, "ab+", buffering=0)  # noqa: SIM115 - see close()
            # A killed run may have left an incomplete record; the next one needs its own line.
            if self._file.tell() and not self._ends_a_line():
                self._file.write(b"\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, record: Mapping[str, int | float]) -> None:
        """Append one record and flush it.

        Raises:
            EdgeLoraError: a value is NaN or infinite, which JSON cannot express, or the disk is
                full.
        """
        for key, value in record.items():
            if not math.isfinite(value):
                raise EdgeLoraError(
                    f"{self._path}: iteration {record['iteration']}: {key} is {value}, expected a "
                    "finite number; check the learning rate and its schedule"
                )
        self._append(record)

    def note(self, kind: str, facts: Any) -> None:
        """Append a record that is not a report of a loss.

        Args:
            kind: the only key of the record.
            facts: its value; JSON values only.

        Raises:
            EdgeLoraError: the disk is full.
        """
        self._begun = self._begun or kind == "run"
        self._append({kind: facts})

    def end(self, error: BaseException | None) -> None:
        """Append the record `end`, unless the run never began.

        Args:
            error: the exception that ended the run; None if it finished.

        Raises:
            EdgeLoraError: the disk is full.
        """
        if not self._begun:
            return
        if error is None:
            self.note("end", {"status": "finished"})
        elif isinstance(error, KeyboardInterrupt):
            self.note("end", {"status": "interrupted"})
        else:
            reason = str(error) or type(error).__name__
            self.note("end", {"status": "failed", "reason": reason})

    def report(self, target: Path) -> None:
        """Write the report page, unless the run never began.

        Args:
            target: path of the page.

        Raises:
            EdgeLoraError: the page cannot be written.
        """
        if self._begun:
            self._file.seek(0)
            write_report(self._file, str(self._path), target)

    def close(self) -> None:
        """Close the file.

        Raises:
            EdgeLoraError: the disk is full.
        """
        try:
            self._file.close()
        except OSError as error:  # some file systems report a failed write only here
            raise cannot_write(self._path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _ends_a_line(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"


@contextmanager
def recorded(config: TrainConfig) -> Iterator[RunLog | None]:
    """Open the log of a run, and write the page `config.report` on exit, even after an error.

    Args:
        config: options of the run.

    Yields:
        The log; None if neither a log nor a report page is configured.

    Raises:
        EdgeLoraError: one of the files cannot be written.
    """
    if config.log is None and config.report is None:
        yield None
        return
    target = None if config.report is None else Path(config.report)
    if target is not None:
        check_target(target)
    with RunLog(config.log) as log:
        try:
            yield log
        except BaseException as error:
            with suppress(EdgeLoraError):  # the first error is the one to report
                log.end(error)
                if target is not None:
                    log.report(target)
            raise
        log.end(None)
        if target is not None:
            log.report(target)
