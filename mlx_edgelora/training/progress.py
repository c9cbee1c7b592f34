"""What a person sees while the model trains: a live line on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

from tqdm import tqdm

from mlx_edgelora.training.report import Report


class Progress:
    """Shows a run: every report as a line, and a live line under them on a terminal.

    Args:
        iters: steps of the run.
        lines: where reports go; standard output by default.
        live: where the live line goes if it is a terminal; standard error by default,
            so that reports can be redirected to a file while the live line stays.
    """

    def __init__(self, iters: int, lines: TextIO | None = None, live: TextIO | None = None) -> None:
        self._iters = iters
        self._lines = sys.stdout if lines is None else lines
        self._live = sys.stderr if live is None else live
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        if self._live.isatty():
            self._bar = self._make_bar(self._iters, "step", position=0)
        return self

    def __exit__(self, *_exception) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, window: Report) -> None:
        """Move the live line one step on, with the figures of the window so far."""
        if self._bar is not None:
            self._bar.set_postfix_str(_live_figures(window), refresh=False)
            self._bar.update()

    @contextmanager
    def validation(self, batches: int) -> Iterator[Callable[[], None]]:
        """Show the progress of a validation; yields what to call after every batch."""
        if self._bar is None:
            yield lambda: None
            return
        with self._make_bar(batches, "validation", position=1) as bar:
            yield lambda: bar.update() and None

    def report(self, report: Report) -> None:
        """Print a training or validation report as one line."""
        if report.kind == "val_loss":
            self.note(
                f"step {report.iteration}/{self._iters}: validation loss {report.loss:.3f}, "
                f"took {report.seconds:.1f} s"
            )
            return
        left = (self._iters - report.iteration) * report.seconds / report.batches
        self.note(
            f"step {report.iteration}/{self._iters}: loss {report.loss:.3f}, "
            f"learning rate {report.learning_rate:.3e}, {_costs(report)}, "
            f"{tqdm.format_interval(left)} left"
        )

    def saved(self, iteration: int, folder: Path) -> None:
        """Tell that the adapter of a step is on disk."""
        self.note(f"step {iteration}/{self._iters}: adapter saved in {folder}")

    def note(self, text: str) -> None:
        """Print a line without disturbing the live one."""
        tqdm.write(text, file=self._lines)
        self._lines.flush()

    def _make_bar(self, total: int, label: str, position: int) -> tqdm:
        return tqdm(
            total=total,
            desc=label,
            file=self._live,
            dynamic_ncols=True,
            leave=False,
            position=position,
            miniters=1,
            bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
        )


def _costs(report: Report) -> str:
    """Speed, memory and disk traffic; MLX's peak beside what the system sees."""
    usage = report.usage
    return (
        f"{report.tokens_per_second:.0f} tokens/s, "
        f"peak {_size(usage.peak_memory_bytes)}, footprint {_size(usage.footprint_bytes)}, "
        f"read {_size(report.read_bytes / report.batches)} and "
        f"written {_size(report.written_bytes / report.batches)} a step"
    )


def _live_figures(report: Report) -> str:
    """Loss and costs in the some 60 columns that a narrow terminal leaves for them."""
    usage = report.usage
    return (
        f"loss {report.loss:.3f}, {report.tokens_per_second:.0f} tok/s, "
        f"peak {_size(usage.peak_memory_bytes)}, process {_size(usage.footprint_bytes)}, "
        f"r {_size(report.read_bytes / report.batches)} "
        f"w {_size(report.written_bytes / report.batches)}"
    )


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
