"""Canonical rows turned into tokens, as mlx-lm turns its own.

Tokens and offsets are those of `mlx_lm.tuner.datasets`; its classes are not used because they do
not check that a prompt begins its conversation, on which `offset` rests.
"""

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from mlx_edgelora.data.conversation import CanonicalRow, Message, PlainText, RowError

Encoder = Callable[[CanonicalRow], tuple[list[int], int]]


def encoder(tokenizer: Any, mask_prompt: bool) -> Encoder:
    """The function row -> (tokens, offset).

    Args:
        tokenizer: as `mlx_lm.load` returns it.
        mask_prompt: train on the completion or last message only; else offset is 0.

    The function raises `RowError` for a row that does not go with `mask_prompt`, and for
    messages that the chat template refuses.
    """

    def encode(row: CanonicalRow) -> tuple[list[int], int]:
        if isinstance(row, PlainText):
            if mask_prompt:
                raise RowError(
                    "got a row of plain text, which has no prompt, with mask_prompt; turn "
                    "mask_prompt off or use rows of prompts and completions or of messages"
                )
            return _encode_text(tokenizer, row.text), 0
        return _encode_chat(tokenizer, row.messages, row.tools, mask_prompt)

    return encode


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Plain text, ended by the end-of-sequence token."""
    tokens = list(tokenizer.encode(text))
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        tokens.append(end)
    return tokens


def _encode_chat(
    tokenizer: Any, messages: list[Message], tools: Any, mask_prompt: bool
) -> tuple[list[int], int]:
    """Tokens of the templated conversation, and where its last message begins if masked."""
    tokens = _apply_template(tokenizer, messages, tools)
    if not mask_prompt:
        return tokens, 0
    answered = messages[-1]["role"] == "assistant"
    prompt = _apply_template(tokenizer, messages[:-1], tools, add_generation_prompt=answered)
    offset = _common_prefix(prompt, tokens)
    # A template may open the answer otherwise when asked to generate (with a thinking tag, say)
    # than when it is given: what both share is prompt. But all that precedes must be there.
    if offset < len(prompt):
        bare = _apply_template(tokenizer, messages[:-1], tools) if answered else prompt
        if tokens[: len(bare)] != bare:
            raise RowError(
                "the chat template writes the prompt differently when the answer follows, so "
                "mask_prompt cannot tell them apart; turn mask_prompt off or change the template"
            )
    return tokens, offset


def _apply_template(
    tokenizer: Any, messages: list[Message], tools: Any, **options: Any
) -> list[int]:
    if not messages:
        return []
    try:
        return list(
            tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        if getattr(tokenizer, "has_chat_template", True) is False:
            raise RowError(
                "the model's tokenizer has no chat template, which this format needs; use the "
                "text format or an instruction-tuned model"
            ) from error
        raise RowError(f"the chat template refuses the messages ({error})") from error


def _common_prefix(left: list[int], right: list[int]) -> int:
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))
