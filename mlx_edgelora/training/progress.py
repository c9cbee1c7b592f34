"""What a person sees while the model trains: a table, and on a terminal a bar under it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from mlx_edgelora.measure.text import COLUMNS, wrapped
from mlx_edgelora.measure.units import clock, size
from mlx_edgelora.training.report import LossReport

# Columns of the table after the first: title and width.
TABLE = {
    "train loss": 10,
    "val loss": 8,
    "tok/s": 7,
    "peak": 7,
    "left": 8,
    "lr": 8,
    "grad norm": 9,
}
# Redraws a second. Each takes the host a millisecond or two, which a fast GPU waits for.
REDRAWS = 2
# ANSI colours, so that they are the terminal's own, dark or light.
BAR, REST = "cyan", "bright_black"


class Progress:
    """Shows a run: a table of reports, and on a terminal a bar under it.

    Args:
        iters: steps of the run.
        lines: where the table goes; standard output by default.
        live: where the bar goes if it is a terminal; standard error by default, so that the table
            can be redirected to a file while the bar stays.
        verbose: a second line for each report.
    """

    def __init__(
        self,
        iters: int,
        lines: TextIO | None = None,
        live: TextIO | None = None,
        verbose: bool = False,
    ) -> None:
        self._iters, self._verbose, self._titled = iters, verbose, False
        self._lines = sys.stdout if lines is None else lines
        self._on_terminal = self._lines.isatty()
        # Where both are the terminal, the bar must know of every line above it.
        self._bars = bars(self._lines if self._on_terminal else live or sys.stderr)
        self._task = self._bars.add_task("step", total=iters, figures="", left="")
        columns = min(self._bars.console.width, COLUMNS) if self._on_terminal else COLUMNS
        first = max(4, 2 * len(str(iters)) + 1)
        self._widths = _fitting({"step": first} | TABLE, columns)
        room = columns - sum(self._widths.values())
        self._gap = "  " if room >= 2 * (len(self._widths) - 1) else " "

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_exception) -> None:
        self._bars.stop()

    def step(self, window: LossReport) -> None:
        """Move the bar one step on, with the figures of the window so far."""
        if self._bars.disable:
            return
        left = (self._iters - window.iteration) * window.seconds / window.batches
        figures = f" loss {window.loss:.3f}  {window.tokens_per_second:.0f} tok/s"
        figures += f"  {size(window.usage.peak_memory_bytes)}"
        self._bars.update(self._task, advance=1, figures=figures, left=_Left(left))

    @contextmanager
    def validation(self, batches: int) -> Iterator[Callable[[], None]]:
        """Show the progress of a validation; yields what to call after every batch."""
        task = self._bars.add_task("validation", total=batches, figures="", left="")
        try:
            yield lambda: self._bars.advance(task)
        finally:
            self._bars.remove_task(task)

    def report(self, report: LossReport) -> None:
        """Print a training or validation report as a row of the table."""
        usage = report.usage
        row = {"step": f"{report.iteration}/{self._iters}", "peak": size(usage.peak_memory_bytes)}
        if report.kind == "val_loss":
            row |= {"val loss": f"{report.loss:.3f}"}
        else:
            left = (self._iters - report.iteration) * report.seconds / report.batches
            norm = report.grad_norm
            row |= {
                "train loss": f"{report.loss:.3f}",
                "tok/s": f"{report.tokens_per_second:.0f}",
                "left": clock(left),
                "lr": f"{report.learning_rate:.2e}",
                "grad norm": "" if norm is None else f"{norm:.3g}",
            }
        if not self._titled:
            self._titled = True
            self._print(self._row({name: name for name in self._widths}), style="bold")
        self._print(self._row(row))
        if self._verbose:
            self._print(f"{'':{self._widths['step']}}{self._gap}{_details(report)}", style="dim")

    def saved(self, iteration: int, folder: Path) -> None:
        """Tell that the adapter of a step is on disk."""
        where = f"{iteration}/{self._iters}".rjust(self._widths["step"])
        self.note(f"{where}{self._gap}adapter saved in {folder}")

    def note(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self._print(wrapped(text))

    def _print(self, text: str, style: str | None = None) -> None:
        if self._on_terminal:
            self._bars.console.print(
                text, style=style, markup=False, highlight=False, soft_wrap=True
            )
        else:
            print(text, file=self._lines, flush=True)

    def _row(self, row: dict[str, str]) -> str:
        cells = [row.get(name, "").rjust(width) for name, width in self._widths.items()]
        return self._gap.join(cells).rstrip()


class _Left:
    """Time that is left, as it is when it is drawn: it runs down while a step lasts."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __format__(self, spec: str) -> str:
        return f"{clock(self._end - time.monotonic())} left"


def bars(live: TextIO) -> Bars:
    """Bars that are gone when they end; none are drawn where `live` is no terminal.

    What is printed to a terminal in the meantime, by whoever it is, goes above them.
    """
    console = Console(file=live)
    # A process that is killed could not show the cursor again.
    console.show_cursor = lambda show=True: False
    return Bars(
        TextColumn("{task.description} {task.completed}/{task.total}"),
        BarColumn(None, REST, complete_style=BAR, finished_style=BAR),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}"),
        console=console,
        refresh_per_second=REDRAWS,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
        disable=not (live.isatty() and console.is_interactive),
        expand=True,
    )


def _fitting(widths: dict[str, int], columns: int) -> dict[str, int]:
    """As many columns of the table as there is room for, from the first."""
    fitting, total = {}, -1
    for name, width in widths.items():
        total += width + 1
        if total > columns:
            break
        fitting[name] = width
    return fitting


def _details(report: LossReport) -> str:
    """The whole process, and what a step reads and writes."""
    read, written = (
        size(count / report.batches) for count in (report.read_bytes, report.written_bytes)
    )
    return f"process {size(report.usage.footprint_bytes)}, {read} read and {written} written a step"
