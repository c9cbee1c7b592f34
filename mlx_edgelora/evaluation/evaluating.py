"""Evaluate a model with and without its adapter, within a memory budget.

Losses are exact, and answers greedy. Each block is read once for both if the adapter can be
switched off; otherwise the model is opened twice.
"""

import dataclasses
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import Dataset
from mlx_edgelora.data.sets import find_sets
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.evaluation.rows import AskedRow, asked_rows
from mlx_edgelora.evaluation.scores import exact_match, token_f1
from mlx_edgelora.inference.generating import Sampling, encode, open_generator
from mlx_edgelora.inference.streamed import open_lazy
from mlx_edgelora.losses.preferences import PREFERENCE_LOSSES
from mlx_edgelora.measure.meter import peak_memory
from mlx_edgelora.measure.text import say
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.lora import can_switch_off
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.storage.files import make_folder, write_atomically
from mlx_edgelora.training.adapters import (
    adapter_file,
    check_adapter,
    model_for,
    read_adapter_config,
)
from mlx_edgelora.training.evaluate import evaluate as evaluate_loss
from mlx_edgelora.training.evaluate import evaluate_both
from mlx_edgelora.training.finetune import perplexity, with_saved_layers
from mlx_edgelora.training.opening import (
    adapted_model,
    adapter_to_start,
    cache_folder,
    explained_failures,
    open_run,
    read_sets,
    spill_place,
)

# Options of the run that made the adapter: they decide which tokens count.
OF_THE_RUN = (
    "data",
    "hf_dataset",
    "data_format",
    "system_prompt",
    "prompt_feature",
    "completion_feature",
    "text_feature",
    "chat_feature",
    "mask_prompt",
    "train_on",
    "allow_lost_content",
    "max_seq_length",
    "packing",
    "dtype",
)


@dataclass(frozen=True)
class Answers:
    """Scores of the answers of one model.

    Attributes:
        exact_match: share of answers that are the expected ones.
        token_f1: mean F1 of their words.
    """

    exact_match: float
    token_f1: float


@dataclass(frozen=True)
class Evaluation:
    """A model without and with an adapter.

    Attributes:
        base_loss: mean loss of a labelled token of the test set, without the adapter.
        adapter_loss: the same with the adapter.
        tokens: number of labelled tokens.
        rows: prompts, expected answers and both answers; those of `save_path`.
        base: scores of the answers without the adapter; None without answers.
        adapter: the same with the adapter.
        peak_memory_bytes: peak of MLX's allocator.
    """

    base_loss: float
    adapter_loss: float
    tokens: int
    rows: list[dict[str, Any]]
    base: Answers | None
    adapter: Answers | None
    peak_memory_bytes: int

    def table(self) -> str:
        """The figures as lines for a terminal."""
        rows = [
            ("loss", f"{self.base_loss:.3f}", f"{self.adapter_loss:.3f}"),
            ("perplexity", *(f"{perplexity(x):.4g}" for x in (self.base_loss, self.adapter_loss))),
        ]
        if self.base is not None:
            for title, name in (("exact match", "exact_match"), ("token F1", "token_f1")):
                shares = (getattr(side, name) for side in (self.base, self.adapter))
                rows.append((title, *(f"{100 * share:.1f} %" for share in shares)))
        lines = [f"{'':12}{'base':>12}{'adapter':>12}"]
        lines += [f"{name:12}{base:>12}{adapter:>12}" for name, base, adapter in rows]
        return "\n".join(lines)


def evaluate(
    adapter_path: str | os.PathLike = "adapters",
    model: str | None = None,
    data: str | None = None,
    num_samples: int = 20,
    max_tokens: int = 256,
    batch_size: int = 4,
    memory_budget: int | str | None = None,
    save_path: str | os.PathLike | None = None,
    notify: Callable[[str], None] = say,
) -> Evaluation:
    """Compare a model without and with an adapter on a test set.

    The options of the data, such as `mask_prompt`, are those of the run that made the adapter. A
    model that does not fit into the budget is read from disk block by block: once for each batch
    of the test set, and twice for each token of the answers of a batch.

    Args:
        adapter_path: folder of the adapter.
        model: a folder or a Hub name; None for the model that the adapter was trained on.
        data: a folder with a test set, or a file of test rows; None for the data of the run.
        num_samples: number of rows whose prompts are answered; 0 for none.
        max_tokens: largest number of tokens of an answer.
        batch_size: number of rows that are computed at once.
        memory_budget: limit of MLX's memory as a size such as "2GB", in bytes, or "min"; None for
            80 % of what is free.
        save_path: JSONL file for the answers, replaced atomically; None for no file.
        notify: called with lines to show.

    Returns:
        The losses, the answers and their scores.

    Raises:
        EdgeLoraError: the adapter does not fit the model, there is no test set, the budget is too
            small, or the file cannot be written.
    """
    for name, value, least in (("num_samples", num_samples, 0), ("max_tokens", max_tokens, 1)):
        if value < least:
            raise EdgeLoraError(f"{name}: got {value}, expected at least {least}")
    if save_path is not None:
        if not num_samples:
            raise EdgeLoraError("save_path: got a file, but num_samples is 0, so it has no rows")
        make_folder(Path(save_path).parent)
    folder = Path(adapter_path)
    options = {"batch_size": batch_size, "memory_budget": memory_budget, "data": data}
    config = _config(folder, model, options, notify)
    with explained_failures(config):
        base_loss, adapter_loss, tokens, asked, prompts = _losses(config, num_samples, notify)
        _free()
        rows = _answered(config, folder, asked, prompts, max_tokens, notify) if asked else []
    if num_samples and not rows:
        notify("note: no row of the test set ends with an answer, so nothing is generated")
    if save_path is not None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        write_atomically({Path(save_path): lambda file: file.write(text)})
    base, adapter = (_scores(rows, side) if rows else None for side in ("base", "adapter"))
    return Evaluation(base_loss, adapter_loss, tokens, rows, base, adapter, peak_memory())


def _config(
    folder: Path, model: str | None, options: dict[str, Any], notify: Callable[[str], None]
) -> TrainConfig:
    """The options of a test of the adapter, with those of the run that made it."""
    saved = read_adapter_config(folder)
    if note := check_adapter(adapter_file(folder)):
        notify(f"note: {note}")
    if saved.get("loss") in PREFERENCE_LOSSES and not options["data"]:
        raise EdgeLoraError(
            f"{folder}: was trained on preferences, which are evaluated by mlx-edgelora train "
            f"--test --loss {saved['loss']}; name other rows with --data"
        )
    values = {name: saved[name] for name in OF_THE_RUN if saved.get(name) is not None}
    values |= {name: value for name, value in options.items() if value is not None}
    if options["data"] is not None:
        values.pop("hf_dataset", None)
    values |= {"model": model_for(folder, model, notify), "adapter_path": str(folder)}
    return with_saved_layers(TrainConfig.from_dict(values | {"train": False, "test": True}))


def _losses(
    config: TrainConfig, num_samples: int, notify: Callable[[str], None]
) -> tuple[float, float, int, list[AskedRow], list[list[int]]]:
    """Losses without and with the adapter, labels, and the prompts to answer with their tokens."""
    open_lazy(config.model, Path(config.adapter_path), cache_folder(config))  # do they fit?
    lazy = adapted_model(config)
    tokenizer = load_tokenizer_of(lazy)
    test_set = read_sets(config, tokenizer, lazy.vocabulary, notify)[2]
    asked = asked_rows(find_sets(config).test, num_samples)
    prompts = [encode(tokenizer, row.messages, row.tools) for row in asked]
    with _opened(config, lazy, test_set) as engine:
        if can_switch_off(config.fine_tune_type):
            base, adapter, tokens = evaluate_both(engine, test_set, config, -1)
        else:
            adapter, tokens = evaluate_loss(engine, test_set, config, -1)
    if not can_switch_off(config.fine_tune_type):
        del lazy, engine
        _free()
        alone = dataclasses.replace(config, adapter_path="", resume_adapter_file=None)
        with _opened(alone, adapted_model(alone), test_set) as engine:
            base, _ = evaluate_loss(engine, test_set, alone, -1)
    for name, loss in (("without", base), ("with", adapter)):
        if not math.isfinite(loss):
            raise EdgeLoraError(
                f"the test loss {name} the adapter is {loss} on {tokens} tokens, expected a finite "
                "number; evaluate another adapter, or with another dtype"
            )
    return base, adapter, tokens, asked, prompts


@contextmanager
def _opened(config: TrainConfig, lazy: LazyModel, test_set: Dataset) -> Iterator[Engine]:
    opening = config, lazy, [test_set], spill_place(config), _discard, adapter_to_start(config)
    with open_run(*opening) as (engine, _):
        yield engine


def _free() -> None:
    """Free what is no longer used: engines have reference cycles, and two models might not fit."""
    gc.collect()
    mx.clear_cache()


def _discard(line: str) -> None:
    """Do nothing with a line about a memory plan, which is that of a training step."""


def _answered(
    config: TrainConfig,
    folder: Path,
    asked: Sequence[AskedRow],
    prompts: Sequence[list[int]],
    max_tokens: int,
    notify: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Answers without and with the adapter, with their scores."""
    tokens, at_once = max_tokens + max(map(len, prompts)), min(config.batch_size, len(prompts))
    notify(f"answers to {len(prompts)} rows of the test set, without and with the adapter")
    sampling, base = Sampling(max_tokens), None
    how = config.memory_budget, at_once, tokens, _discard
    if not can_switch_off(config.fine_tune_type):
        with open_generator(config.model, None, *how) as generator:
            base = generator.answers(prompts, sampling)
        del generator
        _free()
    with open_generator(config.model, folder, *how) as generator:
        if base is None:
            with generator.without_adapter():
                base = generator.answers(prompts, sampling)
        adapter = generator.answers(prompts, sampling)
    return [
        _row(row, {"base": before, "adapter": after})
        for row, before, after in zip(asked, base, adapter, strict=True)
    ]


def _row(row: AskedRow, answers: dict[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {"row": row.place, "prompt": row.messages[-1]["content"]}
    if len(row.messages) > 1:
        result["messages"] = row.messages
    result["expected"] = row.expected
    for side, answer in answers.items():
        scores = Answers(exact_match(answer, row.expected), token_f1(answer, row.expected))
        result[side] = {"answer": answer, **asdict(scores)}
    return result


def _scores(rows: Sequence[dict[str, Any]], side: str) -> Answers:
    exact, f1 = (
        math.fsum(row[side][name] for row in rows) / len(rows)
        for name in ("exact_match", "token_f1")
    )
    return Answers(exact, f1)
