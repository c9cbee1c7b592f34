"""`load` and `generate` for Python, as in mlx-lm, within a memory budget."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_edgelora.config.kinds import BUDGET, read_value
from mlx_edgelora.inference.generating import encode, open_ready
from mlx_edgelora.inference.streamed import StreamedModel
from mlx_edgelora.training.adapters import model_for


def load(
    model: str,
    adapter: str | os.PathLike | None = None,
    memory_budget: int | str | None = None,
    tokens: int = 2048,
) -> tuple[nn.Module | StreamedModel, TokenizerWrapper]:
    """Load a model to generate with, as `mlx_lm.load` does, within a memory budget.

    A model that fits is the one of `mlx_lm.load`. Of another model the first blocks, and if needed
    the vocabulary head, are read from disk in every call. It can be passed to the functions of
    mlx-lm; its method `close` closes its files.

    Args:
        model: a folder or a Hub name.
        adapter: folder of an adapter; None for the base model.
        memory_budget: limit of MLX's memory as a size such as "2GB", in bytes, or "min" for the
            smallest possible peak; None for 80 % of what is free.
        tokens: tokens of the longest prompt and its answer together.

    Returns:
        The model and its tokenizer.

    Warns:
        UserWarning: the adapter was trained on another model.

    Raises:
        EdgeLoraError: the model or adapter cannot be used, they do not fit each other, or the
            budget is too small.
    """
    if memory_budget is not None:
        memory_budget = read_value("memory_budget", memory_budget, BUDGET)
    path = None if adapter is None else Path(adapter)
    if path is not None:
        model_for(path, model, _warn)
    ready, tokenizer, _ = open_ready(model, path, memory_budget, 1, tokens)
    return ready, tokenizer


def _warn(line: str) -> None:
    warnings.warn(line.removeprefix("note: "), stacklevel=4)


def generate(
    model: nn.Module | StreamedModel,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | Sequence[dict[str, Any]],
    **options: Any,
) -> str:
    """Answer a prompt, as `mlx_lm.generate` does.

    Args:
        model: a model of `load`, or of `mlx_lm.load`.
        tokenizer: its tokenizer.
        prompt: messages of a conversation, to which the chat template is applied, or a text or
            tokens, which are taken as they are.
        options: those of `mlx_lm.generate`, such as `max_tokens`, `sampler` and `verbose`.

    Returns:
        The text of the answer.

    Raises:
        EdgeLoraError: the tokenizer's chat template refuses the conversation.
    """
    tokens = list(prompt)
    if isinstance(prompt, str) or (tokens and isinstance(tokens[0], dict)):
        tokens = encode(tokenizer, prompt)
    if not isinstance(model, StreamedModel):
        return mlx_lm.generate(model, tokenizer, tokens, **options)
    with model.generating():
        options = {"prefill_step_size": model.prefill_step} | options
        return mlx_lm.generate(model, tokenizer, tokens, **options)
