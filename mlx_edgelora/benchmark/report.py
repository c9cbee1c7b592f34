"""What came out: for the terminal, as Markdown and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_edgelora.benchmark.contenders import PLENTY
from mlx_edgelora.benchmark.ladder import TableRow
from mlx_edgelora.benchmark.results import Result

MB = 10**6
COLUMNS = (
    "contender",
    "budget MB",
    "peak MB",
    "process MB",
    "step s",
    "of mlx-lm's time",
    "tokens/s",
    "read MB",
    "written MB",
    "loss",
)


@dataclass
class ContextResults:
    """The results at one context.

    Attributes:
        tokens: of a row that the model sees, at most.
        batch_tokens: of a step, the median.
        labelled: share of them with labels.
        movement: relative change of mlx-lm's loss on a batch that came again.
        results: of the contenders; mlx-lm's first.
        failed: why there are none.
    """

    tokens: int
    batch_tokens: int = 0
    labelled: float = 0.0
    movement: float | None = None
    results: list[Result] = field(default_factory=list)
    failed: str | None = None


@dataclass
class BenchmarkReport:
    """Everything that one run of the benchmark found.

    Attributes:
        command: as it was called.
        made: date.
        machine, versions, commit: where and with what.
        settings: of the comparison, by name.
        notes: what a reader must know.
        contexts: the comparison.
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
        """Whether everything was measured that could be, and nothing was at fault."""
        results = [result for context in self.contexts for result in context.results]
        failed = any(context.failed for context in self.contexts)
        return not failed and not any(result.faults for result in results)

    def json(self) -> str:
        """All of it, with the figures that the tables show."""
        values = asdict(self)
        for context, shown in zip(self.contexts, values["contexts"], strict=True):
            for result, row in zip(context.results, shown["results"], strict=True):
                row["valid"] = not result.faults and result.absent is None
                if result.timed:
                    row["median_seconds"] = result.seconds
                    row["tokens_per_second"] = context.batch_tokens / result.seconds
        return json.dumps(values, indent=1) + "\n"

    def text(self) -> str:
        """Tables for a terminal."""
        return "\n\n".join(self._parts(_aligned))

    def markdown(self) -> str:
        """The same as Markdown."""
        head = [f"# Benchmark of {self.settings['model']}"]
        about = {"made": self.made, "commit": self.commit or "unknown", **self.machine}
        about |= {"versions": ", ".join(f"{k} {v}" for k, v in self.versions.items())}
        about |= self.settings
        lines = [f"- {name}: {value}" for name, value in about.items()]
        command = f"```sh\n{self.command}\n```"
        return "\n\n".join([*head, "\n".join(lines), command, *self._parts(_marked)]) + "\n"

    def _parts(self, drawn: Any) -> list[str]:
        parts = list(self.notes)
        for context in self.contexts:
            if context.failed:
                parts.append(f"{context.tokens} tokens: {context.failed}")
                continue
            parts.append(heading(context))
            parts.append(drawn([COLUMNS, *(row(result, context) for result in context.results)]))
            parts += remarks(context)
        if self.ladder:
            parts.append("The published table, one technique at a time (docs/benchmarks.md):")
            parts.append(drawn([TableRow.COLUMNS, *(table_row.row() for table_row in self.ladder)]))
        return parts


def heading(context: ContextResults) -> str:
    """One line above a table."""
    bare = context.results[0].bare
    return (
        f"{context.tokens} tokens: {context.batch_tokens} in a step, {context.labelled:.0%} of "
        f"them labelled; the interpreter with all libraries and no model is {bare / MB:.0f} MB of "
        "every process"
    )


def row(result: Result, context: ContextResults) -> tuple[str, ...]:
    """The figures of a contender."""
    budget = _budget(result.budget)
    if result.absent is not None:
        return (result.name, budget, "-", "-", "-", "not measured", "-", "-", "-", "-")
    times = f"{result.seconds:.3g} ({min(result.timed):.3g} to {max(result.timed):.3g})"
    speed = f"{context.batch_tokens / result.seconds:.0f}"
    figures = (f"{result.peak / MB:.1f}", f"{result.footprint / MB:.0f}", times)
    moved = tuple(_mb(result.moved(name)) for name in ("read", "written"))
    losses = f"{result.losses[0]:.4f} to {result.losses[-1]:.4f}"
    return (result.name, budget, *figures, ratio(result), speed, *moved, losses)


def ratio(result: Result) -> str:
    """Times over mlx-lm's, where they may be compared."""
    if result.faults:
        return "INVALID"
    if not result.ratios:
        return "1"
    if result.kernels:
        return "other kernels"
    ordered = sorted(result.ratios)
    middle = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
    return f"{middle:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def remarks(context: ContextResults) -> list[str]:
    """What is wrong with some rows, and what the check of losses is worth."""
    lines = []
    for result in context.results:
        lines += [f"{result.name} is INVALID: {fault}" for fault in result.faults]
        if result.absent is not None:
            lines.append(f"{result.name} was not measured: {result.absent}")
        if result.kernels:
            lines.append(f"{result.name}: {result.kernels}")
    if context.movement is None:
        lines.append("no batch came twice, so that the adapters alone tell who trained")
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _budget(budget: int | str | None) -> str:
    if not isinstance(budget, int):
        return budget or ""
    return "plenty" if budget == PLENTY else f"{budget / MB:.1f}"


def _mb(size: float | None) -> str:
    return "unknown" if size is None else f"{size / MB:.1f}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _marked(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
