"""The report of a benchmark as text for a terminal, as Markdown and as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_edgelora.benchmark.contenders import PLENTY
from mlx_edgelora.benchmark.ladder import TableRow
from mlx_edgelora.benchmark.results import Result
from mlx_edgelora.measure.text import wrapped
from mlx_edgelora.measure.units import duration, size

# Columns of a line in a terminal.
WIDTH = 100
COLUMNS = (
    "contender",
    "memory",
    "time",
    "budget",
    "peak",
    "process",
    "step",
    "tok/s",
    "read",
    "written",
)


@dataclass
class ContextResults:
    """The results at one context.

    Attributes:
        tokens: largest number of tokens of a row that the model sees.
        batch_tokens: tokens of a step, the median.
        labelled: share of the tokens with labels.
        movement: relative change of mlx-lm's loss on a repeated batch; None if no batch is
            repeated.
        results: results of the contenders, mlx-lm first.
        failed: the reason if there are no results.
    """

    tokens: int
    batch_tokens: int = 0
    labelled: float = 0.0
    movement: float | None = None
    results: list[Result] = field(default_factory=list)
    failed: str | None = None


@dataclass
class BenchmarkReport:
    """The results of one run of the benchmark.

    Attributes:
        command: command line of the run.
        made: date of the run.
        machine: description of the machine.
        versions: versions of the packages.
        commit: commit of this package; None if unknown.
        settings: settings of the comparison by name.
        notes: notes for the reader.
        contexts: results of the comparison by context.
        ladder: rows of the published table.
    """

    command: str
    made: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    contexts: list[ContextResults] = field(default_factory=list)
    ladder: list[TableRow] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether no context failed and no result has a fault."""
        results = [result for context in self.contexts for result in context.results]
        failed = any(context.failed for context in self.contexts)
        return not failed and not any(result.faults for result in results)

    def json(self) -> str:
        """The report as JSON, including the numbers in the tables."""
        values = asdict(self)
        for context, shown in zip(self.contexts, values["contexts"], strict=True):
            for result, row in zip(context.results, shown["results"], strict=True):
                row["valid"] = not result.faults and result.absent is None
                if result.timed:
                    row["median_seconds"] = result.seconds
                    row["tokens_per_second"] = context.batch_tokens / result.seconds
        return json.dumps(values, indent=1) + "\n"

    def text(self) -> str:
        """The report as text with tables for a terminal."""
        return wrapped("\n\n".join(self._parts(_aligned)), WIDTH)

    def markdown(self) -> str:
        """The report as Markdown."""
        head = [f"# Benchmark of {self.settings['model']}"]
        about = {"made": self.made, "commit": self.commit or "unknown", **self.machine}
        about |= {"versions": ", ".join(f"{k} {v}" for k, v in self.versions.items())}
        about |= self.settings
        lines = [f"- {name}: {value}" for name, value in about.items()]
        command = f"```sh\n{self.command}\n```"
        return "\n\n".join([*head, "\n".join(lines), command, *self._parts(_marked)]) + "\n"

    def _parts(self, drawn: Any) -> list[str]:
        parts = []
        for context in self.contexts:
            if context.failed:
                parts.append(f"{context.tokens} tokens: {context.failed}")
                continue
            parts.append(self._heading(context))
            parts.append(drawn([COLUMNS, *(row(result, context) for result in context.results)]))
        if self.ladder:
            parts.append("The published table, one technique at a time (docs/benchmarks.md):")
            parts.append(drawn([TableRow.COLUMNS, *(table_row.row() for table_row in self.ladder)]))
        notes = [note for context in self.contexts for note in remarks(context)]
        if measured := [context for context in self.contexts if context.results]:
            notes += legend(measured)
        notes += self.notes
        if notes:
            parts.append("\n".join(f"- {note}" for note in dict.fromkeys(notes)))
        return parts

    def _heading(self, context: ContextResults) -> str:
        """The line above a table."""
        model, dtype = self.settings.get("model"), self.settings.get("dtype")
        rows = self.settings.get("batch", 1)
        shape = f"{context.tokens} tokens" if rows == 1 else f"{rows} x {context.tokens} tokens"
        return f"{model}, {dtype}; {shape}, {100 * context.labelled:.0f} % of them labelled"


def row(result: Result, context: ContextResults) -> tuple[str, ...]:
    """The cells of a contender: multiples of mlx-lm's numbers, then absolute numbers."""
    budget = _budget(result.budget)
    if result.absent is not None:
        return (result.name, "-", "-", budget, *("-",) * 6)
    memory = f"{result.peak / context.results[0].peak:.2f}" if result.ratios else "1"
    figures = size(result.peak), size(result.footprint), duration(result.seconds)
    speed = f"{context.batch_tokens / result.seconds:.0f}"
    moved = (_moved(result.moved(name)) for name in ("read", "written"))
    return (result.name, memory, ratio(result), budget, *figures, speed, *moved)


def ratio(result: Result) -> str:
    """The ratio of times to mlx-lm's as text; "-" if they cannot be compared."""
    if result.faults:
        return "INVALID"
    if not result.ratios:
        return "1"
    if result.kernels:
        return "-"
    return f"{statistics.median(result.ratios):.2f}"


def remarks(context: ContextResults) -> list[str]:
    """Notes on invalid or missing rows, and on whether the comparison of losses is conclusive."""
    lines = []
    for result in context.results:
        lines += [f"{result.name} is INVALID: {fault}" for fault in result.faults]
        if result.absent is not None:
            lines.append(f"{result.name} was not measured: {result.absent}")
        if result.kernels:
            lines.append(f"{result.name}: no time, for {result.kernels}")
    if context.results and context.movement is None:
        lines.append("No batch came twice, so that the adapters alone tell who trained.")
    return lines


def legend(contexts: Sequence[ContextResults]) -> list[str]:
    """Notes on the columns and on the agreement of the contenders."""
    results = [result for context in contexts for result in context.results]
    bare = max(context.results[0].bare for context in contexts)
    lines = [
        "memory: peak of MLX's allocator over a run, weights included, as a multiple of mlx-lm's. "
        f"process: the largest footprint, {size(bare)} of it the interpreter with all libraries.",
        "time: of a step, over mlx-lm's step of the same round; the median of "
        f"{max(len(result.ratios) for result in results)} rounds{_spread(results)}.",
    ]
    if any(result.name.endswith("%") for result in results):
        lines.append("A budget in % is a share of the peak of mlx-lm with checkpointing.")
    if agreed := [agreement(context) for context in contexts if agreement(context)]:
        losses, adapters = (max(found) for found in zip(*agreed, strict=True))
        lines.append(
            f"All train the same: losses of every step are within {losses:.0e} of mlx-lm's, "
            f"trained adapters within {adapters:.0e} of the way that mlx-lm's went."
        )
    return lines


def agreement(context: ContextResults) -> tuple[float, float] | None:
    """Largest relative distance of losses and of adapters; None if a result is invalid."""
    first, *others = context.results
    others = [result for result in others if result.absent is None]
    if not others or any(result.faults for result in context.results):
        return None
    losses = [
        abs(own - theirs) / max(1.0, abs(theirs))
        for result in others
        for own, theirs in zip(result.losses, first.losses, strict=False)
    ]
    return max(losses), max(result.adapter_gap or 0.0 for result in others)


def _spread(results: Sequence[Result]) -> str:
    """The largest deviation of a round from the median, in words."""
    shares = [
        abs(one / statistics.median(result.ratios) - 1)
        for result in results
        if not result.kernels
        for one in result.ratios
    ]
    return f", none of which is more than {100 * max(shares):.0f} % off" if shares else ""


def _budget(budget: int | str | None) -> str:
    if not isinstance(budget, int):
        return budget or ""
    return "none" if budget == PLENTY else size(budget)


def _moved(count: float | None) -> str:
    return "unknown" if count is None else size(count)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH else " "
    lines = []
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        lines.append(gap.join(cells).rstrip())
    return "\n".join(lines)


def _marked(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
