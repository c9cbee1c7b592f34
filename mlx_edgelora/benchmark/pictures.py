"""Plots of a report; they need matplotlib (the `plot` extra)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import matplotlib

from mlx_edgelora.benchmark.contenders import PLENTY
from mlx_edgelora.benchmark.published import ROWS, published
from mlx_edgelora.benchmark.report import BenchmarkReport
from mlx_edgelora.benchmark.results import Result
from mlx_edgelora.storage.files import Writer

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

GB = 10**9
# This package is blue, lighter with a smaller budget; other contenders have other colours.
OURS = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6")
OTHERS = ("#b30000", "#e34a33", "#fdae61", "#7a0177", "#238b45", "#8c510a")
MARKS = ("s", "D", "^", "P", "X", "v")


def peak_by_context(report: BenchmarkReport, shape: str | None) -> Writer:
    """Plot peaks of MLX's allocator by context, with the published lines for a shape."""

    def draw(file: BinaryIO) -> None:
        with _figure(file, (8.5, 5.8)) as axes:
            for name, (colour, mark) in _styles(report).items():
                points = [
                    (context.tokens, result.peak / GB)
                    for context in report.contexts
                    for result in context.results
                    if result.name == name and _shown(result)
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=name)
            for row, dash in zip(ROWS[-2:], ((2, 2), (6, 2)), strict=True):
                known = {k: v for k, v in published(shape, row).items() if v is not None}
                if known:
                    label = f"published, whole model: {row}"
                    axes.plot(*zip(*known.items(), strict=True), "k", dashes=dash, label=label)
            axes.set(
                title=f"Peak memory of fine-tuning, {report.settings['model']}",
                xlabel="tokens of a row",
                ylabel="peak of MLX's allocator, GB",
                xscale="log",
                yscale="log",
            )
            ticks = sorted(
                {context.tokens for context in report.contexts} | set(published(shape, ROWS[-1]))
            )
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
            _finish(axes, axes.yaxis)

    return draw


def time_against_peak(report: BenchmarkReport) -> Writer:
    """Plot seconds of a step by peak at the longest context."""

    def draw(file: BinaryIO) -> None:
        measured = [context for context in report.contexts if not context.failed]
        context = max(measured, key=lambda one: one.tokens, default=None)
        with _figure(file, (8.5, 5.8)) as axes:
            styles = _styles(report)
            results = [] if context is None else [r for r in context.results if _shown(r)]
            line = sorted((r.peak / GB, r.seconds) for r in results if r.budget is not None)
            if line:
                axes.plot(*zip(*line, strict=True), color=OURS[3], linewidth=1, zorder=1)
            for result in results:
                colour, mark = styles[result.name]
                low, high = result.seconds - min(result.timed), max(result.timed) - result.seconds
                label = result.name + ", other kernels" * (result.kernels is not None)
                axes.errorbar(
                    result.peak / GB,
                    result.seconds,
                    yerr=[[low], [high]],
                    color=colour,
                    marker=mark,
                    markersize=8,
                    capsize=3,
                    linestyle="",
                    label=label,
                )
            tokens = "" if context is None else f", {context.tokens} tokens"
            axes.set(
                title=f"What less memory costs, {report.settings['model']}{tokens}",
                xlabel="peak of MLX's allocator, GB",
                ylabel="seconds of a step (median, lowest to highest)",
                xscale="log",
                ylim=(0, None),
            )
            _finish(axes, axes.xaxis)

    return draw


def _shown(result: Result) -> bool:
    """Whether a result is present and valid."""
    return result.absent is None and not result.faults


def _styles(report: BenchmarkReport) -> dict[str, tuple[str, str]]:
    """Colour and marker of each contender."""
    results = {result.name: result for context in report.contexts for result in context.results}
    ours = sorted(
        (result for result in results.values() if result.budget is not None),
        key=lambda result: -result.budget if isinstance(result.budget, int) else PLENTY,
    )
    others = [result.name for result in results.values() if result.budget is None]
    styles = {
        name: (OTHERS[i % len(OTHERS)], MARKS[i % len(MARKS)]) for i, name in enumerate(others)
    }
    return styles | {r.name: (OURS[i % len(OURS)], "o") for i, r in enumerate(ours)}


@contextmanager
def _figure(file: BinaryIO, size: tuple[float, float]) -> Iterator[Axes]:
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _finish(axes: Axes, memory: Axis) -> None:
    """Add plain numbers on the logarithmic axis of memory, a grid and the legend."""
    memory.set_major_locator(LogLocator(subs=(1, 2, 5)))
    memory.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    memory.set_minor_formatter(NullFormatter())
    axes.grid(which="both", color="#dddddd", linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(fontsize=8, loc="outside lower center", ncols=3)
