"""What a person sees while the model trains: a table, and on a terminal a live line under it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

from tqdm import tqdm

from mlx_edgelora.measure.units import clock, size
from mlx_edgelora.training.report import LossReport

# Columns of the table: title, and its width. With a space between them a line has 69.
COLUMNS = {
    "step": 11,
    "train loss": 10,
    "val loss": 9,
    "tok/s": 7,
    "peak": 8,
    "left": 9,
    "lr": 9,
}
# What --verbose adds: the whole process, and what a step reads and writes.
MORE = {"process": 8, "read": 8, "written": 8}


class Progress:
    """Shows a run: a table of reports, and a live line under it on a terminal.

    Args:
        iters: steps of the run.
        lines: where the table goes; standard output by default.
        live: where the live line goes if it is a terminal; standard error by default,
            so that the table can be redirected to a file while the live line stays.
        verbose: more columns.
    """

    def __init__(
        self,
        iters: int,
        lines: TextIO | None = None,
        live: TextIO | None = None,
        verbose: bool = False,
    ) -> None:
        self._iters = iters
        self._lines = sys.stdout if lines is None else lines
        self._live = sys.stderr if live is None else live
        self._bar: tqdm | None = None
        self._columns = COLUMNS | (MORE if verbose else {})
        self._titled = False

    def __enter__(self) -> Self:
        if self._live.isatty():
            self._bar = self._make_bar(self._iters, "step", position=0)
        return self

    def __exit__(self, *_exception) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, window: LossReport) -> None:
        """Move the live line one step on, with the figures of the window so far."""
        if self._bar is not None:
            peak = size(window.usage.peak_memory_bytes)
            speed = f"{window.tokens_per_second:.0f} tok/s"
            figures = f"loss {window.loss:.3f}, {speed}, peak {peak}"
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()

    @contextmanager
    def validation(self, batches: int) -> Iterator[Callable[[], None]]:
        """Show the progress of a validation; yields what to call after every batch."""
        if self._bar is None:
            yield lambda: None
            return
        with self._make_bar(batches, "validation", position=1) as bar:
            yield lambda: bar.update() and None

    def report(self, report: LossReport) -> None:
        """Print a training or validation report as a row of the table."""
        usage = report.usage
        row = {
            "step": f"{report.iteration}/{self._iters}",
            "peak": size(usage.peak_memory_bytes),
            "process": size(usage.footprint_bytes),
        }
        if report.kind == "val_loss":
            row |= {"val loss": f"{report.loss:.3f}"}
        else:
            left = (self._iters - report.iteration) * report.seconds / report.batches
            row |= {
                "train loss": f"{report.loss:.3f}",
                "tok/s": f"{report.tokens_per_second:.0f}",
                "left": clock(left),
                "lr": f"{report.learning_rate:.2e}",
                "read": size(report.read_bytes / report.batches),
                "written": size(report.written_bytes / report.batches),
            }
        if not self._titled:
            self._titled = True
            self.note(self._row({name: name for name in self._columns}))
        self.note(self._row(row))

    def saved(self, iteration: int, folder: Path) -> None:
        """Tell that the adapter of a step is on disk."""
        where = f"{iteration}/{self._iters}".rjust(COLUMNS["step"])
        self.note(f"{where}  adapter saved in {folder}")

    def note(self, text: str) -> None:
        """Print a line without disturbing the live one."""
        tqdm.write(text, file=self._lines)
        self._lines.flush()

    def _row(self, row: dict[str, str]) -> str:
        cells = [row.get(name, "").rjust(width) for name, width in self._columns.items()]
        return " ".join(cells).rstrip()

    def _make_bar(self, total: int, label: str, position: int) -> tqdm:
        return tqdm(
            total=total,
            desc=label,
            file=self._live,
            dynamic_ncols=True,
            leave=False,
            position=position,
            miniters=1,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:10}| {elapsed}<{remaining}{postfix}",
        )
