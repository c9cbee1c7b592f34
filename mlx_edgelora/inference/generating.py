"""Answer prompts within a memory budget; mlx-lm chooses the tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from mlx_edgelora.data.template_limits import TEMPLATE_ERRORS, limited_templates
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.inference.streamed import (
    InferencePlan,
    StreamedModel,
    open_lazy,
    plan_inference,
    streamed,
)
from mlx_edgelora.model.checkpoint import error_text
from mlx_edgelora.model.lora import without_adapter
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner.machine import default_budget
from mlx_edgelora.storage.files import user_cache


@dataclass(frozen=True)
class Sampling:
    """Options of sampling, as in `mlx_lm.generate`.

    Attributes:
        max_tokens: largest number of tokens of an answer.
        temp: temperature; 0 always takes the likeliest token.
        top_p: smallest total probability of the tokens to choose from; 0 or 1 for all tokens.
        min_p: smallest probability of a token relative to the likeliest one; 0 for all tokens.
        top_k: number of tokens to choose from; 0 for all tokens.
        seed: seed of MLX's random generator; None keeps its state.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """Seed the random generator, and return mlx-lm's sampler."""
        if self.seed is not None:
            mx.random.seed(self.seed)
        return make_sampler(self.temp, self.top_p, self.min_p, top_k=self.top_k)


class Generator:
    """Generates answers with a model; made by `open_generator`."""

    def __init__(
        self,
        model: nn.Module | StreamedModel,
        tokenizer: TokenizerWrapper,
        rows: int,
        prefill_step: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._rows, self._prefill_step = rows, prefill_step

    def encode(self, messages: Sequence[dict[str, str]] | str) -> list[int]:
        """Tokens of a prompt; see the function `encode`."""
        return encode(self._tokenizer, messages)

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """Yield pieces of the text of one answer as they are generated."""
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
        """The answers to prompts, computed in batches of the size planned for."""
        if len(prompts) == 1:
            return ["".join(self.stream(prompts[0], sampling))]
        found: list[str] = []
        for start in range(0, len(prompts), self._rows):
            tokens = batch_generate(
                self._model,
                self._tokenizer,
                [list(prompt) for prompt in prompts[start : start + self._rows]],
                max_tokens=sampling.max_tokens,
                sampler=sampling.sampler(),
                prefill_step_size=self._prefill_step,
                prefill_batch_size=self._rows,
                completion_batch_size=self._rows,
                return_token_ids=True,
            ).token_ids
            found += map(self._text, tokens)
        return found

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of tokens as it is streamed: without a leading space that only joins words."""
        detokenizer = self._tokenizer.detokenizer
        detokenizer.reset()
        for token in tokens:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text

    def seconds_per_token(self) -> float | None:
        """Time of a token of all rows together, measured once; None if no weights are streamed.

        The first pass reads blocks that stay in memory, too, so later tokens may be faster.
        """
        if not isinstance(self._model, StreamedModel):
            return None
        start = time.perf_counter()
        mx.eval(self._model(mx.zeros((self._rows, 1), mx.int32)))
        return time.perf_counter() - start

    def without_adapter(self) -> AbstractContextManager:
        """Switch the adapter off; it is switched on again on exit. See `model.lora`."""
        return without_adapter(self._model)


def encode(
    tokenizer: TokenizerWrapper,
    messages: Sequence[dict[str, str]] | str,
    tools: Sequence | None = None,
) -> list[int]:
    """Tokens of a prompt: a conversation without its next answer, or plain text.

    Without a chat template a single message is encoded as plain text, as in mlx-lm.

    Raises:
        EdgeLoraError: the tokenizer's chat template refuses the conversation.
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
        with limited_templates():
            return tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, return_dict=False
            )
    except TEMPLATE_ERRORS as error:
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
    """Open a model that generates within a memory budget.

    Args:
        model: a folder or a Hub name.
        adapter: folder of the adapter; None for the base model.
        memory_budget: bytes for MLX; "min" for the smallest possible peak; None for the memory
            that is free.
        rows: number of prompts that are answered at once.
        tokens: tokens of the longest prompt and its answer together; with `prompts`, tokens of
            the answer alone.
        notify: called with a line about the memory plan.
        prompts: the prompts to answer, if they are known.

    Yields:
        The generator.

    Raises:
        EdgeLoraError: the model or adapter cannot be used, or the budget is too small.
    """
    ready, tokenizer, plan = open_ready(
        model, adapter, memory_budget, rows, tokens, notify, prompts
    )
    generator = Generator(ready, tokenizer, rows, plan.prefill_step)
    if not isinstance(ready, StreamedModel):
        yield generator
        return
    with closing(ready), ready.generating():
        yield generator


def open_ready(
    model: str,
    adapter: Path | None,
    memory_budget: int | str | None,
    rows: int,
    tokens: int,
    notify: Callable[[str], None] = lambda line: None,
    prompts: Sequence[Sequence[dict[str, str]] | str] = (),
) -> tuple[nn.Module | StreamedModel, TokenizerWrapper, InferencePlan]:
    """The model, its tokenizer and the memory plan; for the arguments see `open_generator`."""
    lazy = open_lazy(model, adapter, user_cache())
    tokenizer = load_tokenizer_of(lazy)
    budget = default_budget()[0] if memory_budget is None else memory_budget
    tokens += max((len(encode(tokenizer, prompt)) for prompt in prompts), default=0)
    plan = plan_inference(lazy, budget, rows, tokens)
    notify(plan.text(len(lazy.model.layers)))
    if not plan.is_resident:
        return streamed(lazy, plan), tokenizer, plan
    ready, _ = load_model(lazy.source)  # mlx-lm's own path, which does not evaluate by blocks
    if adapter is not None:
        ready = load_adapters(ready, str(adapter))
    ready.eval()
    return ready, tokenizer, plan
