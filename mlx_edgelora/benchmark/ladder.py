"""The techniques of the published table, added one at a time by plans and options of this package.

In arXiv 2606.19528 the rows before "+ softmax approximation" hold the logits of all tokens. This
package never does, so its first rows take less memory than the published ones for this reason
alone. A row that takes too much memory or time on this machine is estimated by the planner
(`planner/cost.py`, docs/planner.md) and marked as such.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import mlx.core as mx

from mlx_edgelora.benchmark.contenders import Contender, own
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.machine import free_memory
from mlx_edgelora.benchmark.published import ROWS, published
from mlx_edgelora.benchmark.rounds import ContenderExited, ContenderProcess, Log
from mlx_edgelora.benchmark.shapes import SHAPES, random_model
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.measure.units import duration, size
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import Machine
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import Choice, expected
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

RANK, NEIGHBOURS, LABELLED = 16, 1000, 0.3
STEPS = 2

_KEPT = Plan(streamed_blocks=0, head="resident", prefetch=False, kept_blocks=2**20, inputs="memory")
_CHECKPOINTED = Plan(prefetch=False)
_TILED = replace(
    _CHECKPOINTED,
    tile_tokens=512,
    mlp_bytes=16 * MIB,
    loss_bytes=16 * MIB,
    cache_bytes=16 * MIB,
)


@dataclass(frozen=True)
class Technique:
    """One row of the table, with all techniques up to it.

    Attributes:
        name: name of the row, as published if it is.
        plan: plan of the run.
        weights: float32 or 4bit.
        labelled: share of tokens for which the loss is computed.
        loss: exact or approximate.
    """

    name: str
    plan: Plan
    weights: str = "4bit"
    labelled: float = 1.0
    loss: str = "exact"

    def options(self, plan_file: Path) -> dict:
        """The options of the run."""
        options = {"plan": str(plan_file), "loss": self.loss}
        return options | ({"loss_k": NEIGHBOURS} if self.loss == "approximate" else {})


LADDER = (
    Technique(ROWS[0], _KEPT, weights="float32"),
    Technique(ROWS[1], _KEPT),
    Technique(ROWS[2], _CHECKPOINTED),
    Technique(ROWS[3], _CHECKPOINTED, loss="approximate"),
    Technique(ROWS[4], _CHECKPOINTED, labelled=LABELLED, loss="approximate"),
    Technique("exact loss, streamed", _CHECKPOINTED, labelled=LABELLED),
    Technique("+ tiling", _TILED, labelled=LABELLED),
    Technique("+ paged adapters", replace(_TILED, adapters="paged"), labelled=LABELLED),
)


@dataclass(frozen=True)
class TableRow:
    """The results of a technique at one context.

    Attributes:
        name: name of the technique.
        context: tokens of a row.
        blocks: number of blocks of the measured or estimated model.
        peak: peak of MLX's allocator in bytes.
        seconds: seconds of a step.
        how: "measured", or "computed" with the reason.
        published: published GB of the whole model, or "out of memory"; empty if not published.
        whole: number of blocks of the whole model.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "technique",
        "tokens",
        "blocks",
        "peak",
        "step",
        "how",
        "published GB",
    )
    name: str
    context: int
    blocks: int
    peak: int
    seconds: float
    how: str
    published: str
    whole: int

    def row(self) -> tuple[str, ...]:
        """The cells of the row."""
        published_figure = self.published
        if published_figure and self.blocks != self.whole:
            published_figure += f" ({self.whole} blocks)"
        figures = (size(self.peak), duration(self.seconds))
        return (
            self.name,
            str(self.context),
            str(self.blocks),
            *figures,
            self.how,
            published_figure,
        )


class PublishedTable:
    """Measures or estimates every row of the ladder.

    Args:
        shape: a key of `SHAPES`.
        blocks: number of blocks of the model.
        machine: the machine with its measured rates.
        folder: folder for plans and the output of runs.
        limit: limit in seconds; rows that are expected to take longer are estimated.
        log: called with a line for each row.
    """

    def __init__(
        self, shape: str, blocks: int, machine: Machine, folder: Path, limit: float, log: Log
    ) -> None:
        self._shape, self._blocks, self._machine = shape, blocks, machine
        self._folder, self._limit, self._log_line = folder, limit, log
        self._sizes: dict[str, ModelShape] = {}
        self._free = free_memory()

    def sizes(self, weights: str) -> ModelShape:
        """The sizes of the adapted model; its weights are not computed."""
        if weights not in self._sizes:
            model, _ = random_model(self._shape, self._blocks, weights)
            add_lora(model, -1, RANK)
            self._sizes[weights] = shape_of(
                checked_blocks(model), SHAPES[self._shape][-1], mx.float32
            )
        return self._sizes[weights]

    def expected(self, technique: Technique, context: int) -> Choice:
        """The memory and time of a technique by the planner's formulas."""
        shape = self.sizes(technique.weights)
        batch_shape = BatchShape(1, context, max(1, round(technique.labelled * context)))
        return expected(shape, batch_shape, self._machine, technique.plan)

    def too_much(self, technique: Technique, context: int) -> str | None:
        """The reason why a row is estimated; None if it is measured."""
        choice = self.expected(technique, context)
        if choice.needs > self._free:
            return "no room"
        return "too long" if STEPS * choice.seconds > self._limit else None

    def table_row(self, technique: Technique, context: int, job: TrainingJob | None) -> TableRow:
        """A row, measured with `job`, or estimated if it takes too much memory or time."""
        choice = self.expected(technique, context)
        peak, spent = choice.peak, choice.seconds
        why = self.too_much(technique, context)
        how = f"computed: {why}"
        if why is None:
            try:
                peak, spent = self._measured(technique, job)
                how = "measured"
            except ContenderExited as exited:
                how = f"computed: {exited}"
        known = published(self._shape, technique.name)
        published_figure = "" if context not in known else f"{known[context] or 'out of memory'}"
        self._log_line(f"  {technique.name}, {context} tokens: {how}")
        whole = SHAPES[self._shape][1]
        return TableRow(
            technique.name, context, self._blocks, peak, spent, how, published_figure, whole
        )

    def _measured(self, technique: Technique, job: TrainingJob) -> tuple[int, float]:
        file = self._folder / "plan.json"
        file.write_text(technique.plan.json())
        rival = Contender(technique.name, own("none").runner)
        own_job = job.with_(options=job.options | technique.options(file))
        running = ContenderProcess(rival, own_job, self._folder / "out")
        try:
            running.start()
            for _ in range(STEPS - 1):
                running.step()
            running.finish()
        finally:
            running.close()
        return running.result.peak, running.result.seconds
