"""Display of a run: a table of reports and, on a terminal, a progress bar under it."""

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
# Columns of losses of preferences, behind the losses.
REWARDS = {"margin": 7, "accuracy": 8}
# Redraws per second. Each takes a millisecond or two of the CPU, for which a fast GPU waits.
REDRAWS = 2
# ANSI colours follow the terminal's theme, dark or light.
BAR, REST = "cyan", "bright_black"


class Progress:
    """Shows a table of reports and, on a terminal, a progress bar under it.

    Args:
        iters: number of steps of the run.
        lines: stream of the table; standard output by default.
        live: stream of the bar, used if it is a terminal; standard error by default, so that the
            bar stays when the table is redirected to a file.
        verbose: print a second line for each report.
        silent: show nothing, in processes of a run other than the first.
        has_rewards: whether the loss compares answers.
    """

    def __init__(
        self,
        iters: int,
        lines: TextIO | None = None,
        live: TextIO | None = None,
        verbose: bool = False,
        silent: bool = False,
        has_rewards: bool = False,
    ) -> None:
        self._silent = silent
        self._iters, self._verbose, self._titled = iters, verbose, False
        self._lines = sys.stdout if lines is None else lines
        self._on_terminal = self._lines.isatty()
        # If both are the terminal, rich must print the table so that it can redraw the bar.
        self._bars = bars(self._lines if self._on_terminal else live or sys.stderr)
        self._task = self._bars.add_task("step", total=iters, figures="", left="")
        columns = min(self._bars.console.width, COLUMNS) if self._on_terminal else COLUMNS
        first = max(4, 2 * len(str(iters)) + 1)
        table = {"step": first} | TABLE
        if has_rewards:  # a narrow terminal shows no norm of gradients beside them
            names = list(TABLE.items())
            table = {"step": first} | dict(names[:2]) | REWARDS | dict(names[2:])
        self._widths = _fitting(table, columns)
        room = columns - sum(self._widths.values())
        self._gap = "  " if room >= 2 * (len(self._widths) - 1) else " "

    def __enter__(self) -> Self:
        self._bars.disable |= self._silent
        self._bars.start()
        return self

    def __exit__(self, *_exception) -> None:
        self._bars.stop()

    def step(self, window: LossReport) -> None:
        """Advance the bar by one step, and show the figures since the last report."""
        if self._bars.disable:
            return
        left = (self._iters - window.iteration) * window.seconds / window.batches
        figures = f" loss {window.loss:.3f}  {window.tokens_per_second:.0f} tok/s"
        figures += f"  {size(window.usage.peak_memory_bytes)}"
        self._bars.update(self._task, advance=1, figures=figures, left=_Left(left))

    @contextmanager
    def validation(self, batches: int) -> Iterator[Callable[[], None]]:
        """Show the progress of a validation.

        Args:
            batches: number of batches.

        Yields:
            A function to call after every batch.
        """
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
        row |= _rewards(report)
        if not self._titled:
            self._titled = True
            self._print(self._row({name: name for name in self._widths}), style="bold")
        self._print(self._row(row))
        if self._verbose:
            self._print(f"{'':{self._widths['step']}}{self._gap}{_details(report)}", style="dim")

    def saved(self, iteration: int, folder: Path) -> None:
        """Print that the adapter of a step was saved."""
        where = f"{iteration}/{self._iters}".rjust(self._widths["step"])
        self.note(f"{where}{self._gap}adapter saved in {folder}")

    def note(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self._print(wrapped(text))

    def _print(self, text: str, style: str | None = None) -> None:
        if self._silent:
            return
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
    """Remaining time, computed when it is drawn, so that it decreases during a step."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __format__(self, spec: str) -> str:
        return f"{clock(self._end - time.monotonic())} left"


def bars(live: TextIO) -> Bars:
    """Progress bars that disappear at the end; nothing is drawn if `live` is no terminal.

    Lines that any code prints to a terminal meanwhile appear above the bars.
    """
    console = Console(file=live)
    # The cursor is never hidden, because a killed process could not show it again.
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
    """The first columns of the table that fit into `columns` characters."""
    fitting, total = {}, -1
    for name, width in widths.items():
        total += width + 1
        if total > columns:
            break
        fitting[name] = width
    return fitting


def _rewards(report: LossReport) -> dict[str, str]:
    """The cells of losses of preferences."""
    figures = report.figures
    if figures is None:
        return {}
    margin, accuracy = figures.margin, figures.accuracy
    return {
        "margin": "" if margin is None else f"{margin:.3f}",
        "accuracy": "" if accuracy is None else f"{accuracy:.1%}",
    }


def _details(report: LossReport) -> str:
    """Memory of the whole process, and bytes read and written per step."""
    read, written = (
        size(count / report.batches) for count in (report.read_bytes, report.written_bytes)
    )
    return f"process {size(report.usage.footprint_bytes)}, {read} read and {written} written a step"
