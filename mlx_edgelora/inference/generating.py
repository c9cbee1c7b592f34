"""Answers of a model to prompts, within a memory budget; tokens are chosen by mlx-lm."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jinja2 import TemplateError
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.inference.streamed import open_lazy, plan_inference, streamed
from mlx_edgelora.model.checkpoint import error_text
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner.machine import default_budget
from mlx_edgelora.storage.files import user_cache


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as in `mlx_lm.generate`.

    Attributes:
        max_tokens: of an answer, at most.
        temp: temperature; 0 always takes the likeliest token.
        top_p, min_p, top_k: limits of the choice; 0 for none.
        seed: of MLX's generator; None leaves it alone.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """mlx-lm's, and the generator seeded."""
        if self.seed is not None:
            mx.random.seed(self.seed)
        return make_sampler(self.temp, self.top_p, self.min_p, top_k=self.top_k)


class Generator:
    """A model that answers; make it by `open_generator`."""

    def __init__(
        self, model: nn.Module, tokenizer: TokenizerWrapper, rows: int, prefill_step: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._rows, self._prefill_step = rows, prefill_step

    def encode(self, messages: Sequence[dict[str, str]] | str) -> list[int]:
        """Tokens of a conversation that waits for an answer, or of plain text."""
        return encode(self._tokenizer, messages)

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """The pieces of one answer as they come."""
        responses = stream_generate(
            self._model,
            self._tokenizer,
            prompt,
            max_tokens=sampling.max_tokens,
            sampler=sampling.sampler(),
            prefill_step_size=self._prefill_step,
        )
        for response in responses:
            yield response.text

    def answers(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[str]:
        """The answers to prompts, as many at once as the memory was planned for."""
        if len(prompts) == 1:
            return ["".join(self.stream(prompts[0], sampling))]
        found: list[str] = []
        for start in range(0, len(prompts), self._rows):
            found += batch_generate(
                self._model,
                self._tokenizer,
                [list(prompt) for prompt in prompts[start : start + self._rows]],
                max_tokens=sampling.max_tokens,
                sampler=sampling.sampler(),
                prefill_step_size=self._prefill_step,
                prefill_batch_size=self._rows,
                completion_batch_size=self._rows,
            ).texts
        return found

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model, for as long as this is entered."""
        layers = [m for m in self._model.modules() if "lora_b" in m and hasattr(m, "scale")]
        if not layers:
            raise EdgeLoraError(
                "adapter_path: holds no LoRA layers, so that it cannot be switched off; ask the "
                "base model by a run of its own"
            )
        if any("m" in layer for layer in layers):
            raise EdgeLoraError(
                "adapter_path: a DoRA adapter cannot be switched off; ask the base model by a run "
                "of its own"
            )
        scales = [layer.scale for layer in layers]
        for layer in layers:
            layer.scale = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scale = scale


def encode(tokenizer: TokenizerWrapper, messages: Sequence[dict[str, str]] | str) -> list[int]:
    """Tokens of a conversation that waits for an answer, or of plain text.

    Without a chat template a single message is plain text, as in mlx-lm.

    Raises:
        EdgeLoraError: the tokenizer's template does not take the conversation.
    """
    if not isinstance(messages, str) and not tokenizer.has_chat_template:
        if len(messages) > 1:
            raise EdgeLoraError(
                "the tokenizer has no chat template, expected one for a conversation of "
                f"{len(messages)} messages; ask with a single prompt"
            )
        messages = messages[0]["content"]
    if isinstance(messages, str):
        return tokenizer.encode(messages)
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise EdgeLoraError(
            f"the chat template does not take this conversation ({error_text(error)}); change its "
            "roles, or use --ignore-chat-template"
        ) from error


@contextmanager
def open_generator(
    model: str,
    adapter: Path | None = None,
    memory_budget: int | str | None = None,
    rows: int = 1,
    tokens: int = 2048,
    notify: Callable[[str], None] = print,
    prompts: Sequence[Sequence[dict[str, str]] | str] = (),
) -> Iterator[Generator]:
    """Open a model that answers within a budget.

    Args:
        model: a folder or a Hub name.
        adapter: its folder; None for the base model.
        memory_budget: bytes for MLX; "min" for the least; None for what is free.
        rows: prompts that are answered at once.
        tokens: of the longest prompt with its answer; of an answer, where `prompts` are given.
        notify: gets a line about where the weights are.
        prompts: what will be asked.

    Raises:
        EdgeLoraError: the model or adapter cannot be used, or the budget is too small.
    """
    lazy = open_lazy(model, adapter, user_cache())
    tokenizer = load_tokenizer_of(lazy)
    budget = default_budget()[0] if memory_budget is None else memory_budget
    tokens += max((len(encode(tokenizer, prompt)) for prompt in prompts), default=0)
    plan = plan_inference(lazy, budget, rows, tokens)
    notify(plan.text(len(lazy.model.layers)))
    if plan.is_resident:  # as mlx-lm does it, several operations of blocks at once
        ready, _ = load_model(lazy.source)
        if adapter is not None:
            ready = load_adapters(ready, str(adapter))
        ready.eval()
        yield Generator(ready, tokenizer, rows, plan.prefill_step)
        return
    with _limited(plan.peak), streamed(lazy, plan) as ready:
        yield Generator(ready, tokenizer, rows, plan.prefill_step)


@contextmanager
def _limited(budget: int) -> Iterator[None]:
    """MLX's cache of freed buffers would grow beyond a small budget."""
    before: Any = mx.set_cache_limit(max(16 << 20, budget // 16))
    try:
        yield
    finally:
        mx.set_cache_limit(before)
