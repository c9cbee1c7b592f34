"""Answers to fixed prompts during a run, by the engine's own weights and within its budget.

Answers are greedy, and nothing that training uses is changed: neither MLX's random state nor an
array of the model. Weights that the plan streams are read from disk for every token, once for all
prompts that are answered together. If the budget has no room beside streamed blocks that the plan
keeps in memory, these are read again, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.sets import find_sets
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.evaluation.rows import asked_rows
from mlx_edgelora.inference.generating import Generator, Sampling, encode
from mlx_edgelora.inference.prompts import conversation, read_prompts
from mlx_edgelora.inference.streamed import StreamedModel, working_bytes
from mlx_edgelora.measure.text import named_rows
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.training.callbacks import StepCallback

# Defaults of the options `sample_prompts` and `sample_tokens`.
PROMPTS, TOKENS = 2, 64
# Prompt tokens that are computed at once, and bytes of a tile of a head that is read from disk.
PREFILL_STEP, TILE = 128, 8 << 20


@dataclass(frozen=True)
class SamplePrompts:
    """What is asked during a run.

    Attributes:
        texts: the prompts as text.
        encoded: tokens of the prompts.
        tokenizer: decodes the answers.
        every: number of steps between answers.
        last: number of the last step, after which the prompts are answered, too.
        max_tokens: largest number of tokens of an answer.
    """

    texts: list[str]
    encoded: list[list[int]]
    tokenizer: TokenizerWrapper
    every: int
    last: int
    max_tokens: int


def sample_prompts(config: TrainConfig, tokenizer: TokenizerWrapper) -> SamplePrompts | None:
    """The prompts that a run answers; None without `sample_every`.

    Raises:
        EdgeLoraError: a file of prompts cannot be read, or the data have no prompts.
    """
    if config.sample_every is None:
        return None
    found = list(_conversations(config))
    texts = [messages[-1]["content"] for messages, _ in found]
    encoded = [encode(tokenizer, messages, tools) for messages, tools in found]
    tokens = config.sample_tokens or TOKENS
    return SamplePrompts(texts, encoded, tokenizer, config.sample_every, config.iters, tokens)


def _conversations(config: TrainConfig) -> list[tuple[list[dict[str, Any]], Sequence | None]]:
    if config.sample_prompts is None:
        sets = find_sets(config)
        rows = asked_rows([*sets.valid, *sets.train], PROMPTS)
        if not rows:
            raise EdgeLoraError(
                "sample_every: the data have no prompts with an answer; name prompts with "
                "--sample-prompts"
            )
        return [(row.messages, row.tools) for row in rows]
    found = []
    for text in config.sample_prompts:
        path = Path(text)
        rows = [("sample_prompts", text)]
        if len(text) < 256 and path.is_file():
            rows = list(read_prompts(path, "sample_prompts"))
        found += [(conversation(row, place, config.system_prompt), None) for place, row in rows]
    return found


def sample_callbacks(
    prompts: SamplePrompts | None,
    engine: Engine,
    chosen: RunPlan,
    note: Callable[[str, Any], None],
) -> list[StepCallback]:
    """The callback that answers prompts; none without `sample_every`.

    Args:
        prompts: what is asked; None for nothing.
        engine: the engine of the run, whose weights are loaded.
        chosen: the run with its plan.
        note: adds a record to the run's log.

    Raises:
        EdgeLoraError: not even one prompt can be answered within the budget.
    """
    if prompts is None:
        return []
    return [_Samples(prompts, engine, *_room(prompts, engine, chosen), note)]


def _room(prompts: SamplePrompts, engine: Engine, chosen: RunPlan) -> tuple[int, bool]:
    """Prompts to answer together, and whether blocks must leave memory for the time of answers."""
    shape, plan, budget = chosen.shape, chosen.plan, chosen.budget.bytes
    tokens = max(map(len, prompts.encoded)) + prompts.max_tokens
    weights, kept = engine.walk.weights, 0
    if isinstance(weights, StreamedWeights):
        weights.trim()
        kept = shape.block_bytes * weights.resident_blocks
    mx.clear_cache()
    held = mx.get_active_memory() + chosen.optimizer_bytes
    if plan.streams:
        held += 3 * shape.block_bytes  # in use, read ahead, and cast
    if shape.full and plan.adapters == "paged":
        held += 2 * shape.adapter_bytes
    if plan.head == "streamed":
        held += min(shape.head_bytes, 3 * TILE)
    needs = [
        held + working_bytes(shape, rows, tokens, PREFILL_STEP)
        for rows in range(1, len(prompts.encoded) + 1)
    ]
    if budget is None:
        return 1, bool(kept)
    for left in (0, kept):
        if rows := sum(need - left <= budget for need in needs):
            return rows, bool(left)
    raise EdgeLoraError(
        f"sample_every: an answer of {prompts.max_tokens} tokens needs {size(needs[0] - kept)}, "
        f"but the memory budget is {size(budget)}; raise it, or lower --sample-tokens"
    )


class _Samples(StepCallback):
    """Answers prompts before the first step and every few steps."""

    def __init__(
        self,
        prompts: SamplePrompts,
        engine: Engine,
        rows: int,
        leaves: bool,
        note: Callable[[str, Any], None],
    ) -> None:
        self._prompts, self._engine, self._note = prompts, engine, note
        walk = engine.walk
        self._model = StreamedModel(
            walk.blocks,
            walk.weights,
            walk.adapters,
            engine.head,
            TILE,
        )
        self._generator = Generator(self._model, prompts.tokenizer, rows, PREFILL_STEP)
        self._leaves = leaves
        self._before: list[str] | None = None
        self._first = 0

    def on_step(self, iteration: int, show: Callable[[str], None]) -> None:
        """Answer the prompts if they are due; see `StepCallback`."""
        due = iteration % self._prompts.every == 0 or iteration == self._prompts.last
        if self._before is not None and not due:
            return
        answers = self._answers()
        rows = [{"prompt": text} for text in self._prompts.texts]
        if self._before is None:
            self._before, self._first = answers, iteration
        else:
            rows = [row | {"before": b} for row, b in zip(rows, self._before, strict=True)]
        rows = [row | {"now": now} for row, now in zip(rows, answers, strict=True)]
        self._note("samples", {"step": iteration, "answers": rows})
        for row in rows:
            lines = {"prompt": row["prompt"]}
            if "before" in row:
                lines[f"step {self._first}"] = row["before"]
            lines[f"step {iteration}"] = row["now"]
            short = {name: " ".join(text.split()) for name, text in lines.items()}
            show("\n".join(named_rows(short, 12, indent=2)))

    def _answers(self) -> list[str]:
        engine, model = self._engine, self._engine.model
        if self._leaves:
            engine.walk.weights.set_resident_from(len(engine.walk.blocks))
        model.eval()
        try:
            with self._model.generating():
                return self._generator.answers(
                    self._prompts.encoded, Sampling(self._prompts.max_tokens)
                )
        finally:
            model.train()
            engine.set_plan_and_residency(engine.plan)
            mx.clear_cache()
