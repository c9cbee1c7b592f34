"""mlx-lm's row formats: text, completions and chat (with tools), turned into tokens.

The format is that of the first row, as in mlx-lm, and every later row is held to it. Tokens and
offsets are those of `mlx_lm.tuner.datasets`; its classes are not used because they neither check
rows nor that a prompt begins its conversation, on which `offset` rests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Encoder = Callable[[Mapping[str, Any]], tuple[list[int], int]]


class RowError(ValueError):
    """What is wrong with a row; the reader of the rows knows its place."""


@dataclass(frozen=True)
class Features:
    """The keys of a row that hold what is trained on."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    chat: str = "messages"


def find_encoder(
    first: Mapping[str, Any], tokenizer: Any, features: Features, mask_prompt: bool
) -> Encoder:
    """The function row -> (tokens, offset) for rows like the first one.

    Args:
        first: the first row of the data.
        tokenizer: as `mlx_lm.load` returns it.
        features: keys to look for.
        mask_prompt: train on the completion or last message only; else offset is 0.

    Raises:
        RowError: no known format, or one that does not go with `mask_prompt`. The encoder
            raises it for a row of another format or with values of wrong types.
    """
    if features.prompt in first and features.completion in first:
        return _Completions(tokenizer, features, mask_prompt)
    if features.chat in first:
        return _Chat(tokenizer, features.chat, mask_prompt)
    if features.text in first:
        if mask_prompt:
            raise RowError(
                f"got a row with {features.text!r}, which has no prompt, with mask_prompt; turn "
                "mask_prompt off or use the completions or chat format"
            )
        return _Text(tokenizer, features.text)
    raise RowError(
        f"got the keys {_keys(first)}, expected {features.prompt!r} and "
        f"{features.completion!r}, or {features.chat!r}, or {features.text!r}"
    )


@dataclass(frozen=True)
class _Text:
    """Plain text, ended by the end-of-sequence token."""

    tokenizer: Any
    key: str

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        tokens = list(self.tokenizer.encode(_string(row, self.key)))
        end = self.tokenizer.eos_token_id
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        return tokens, 0


@dataclass(frozen=True)
class _Completions:
    """A prompt and its completion, as the two messages of a conversation."""

    tokenizer: Any
    features: Features
    mask_prompt: bool

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        messages = [
            {"role": "user", "content": _string(row, self.features.prompt)},
            {"role": "assistant", "content": _string(row, self.features.completion)},
        ]
        return _encode_chat(self.tokenizer, messages, row.get("tools"), self.mask_prompt)


@dataclass(frozen=True)
class _Chat:
    """A conversation; with `mask_prompt` its last message is trained."""

    tokenizer: Any
    key: str
    mask_prompt: bool

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        messages = _value(row, self.key)
        if not isinstance(messages, list) or not messages:
            raise RowError(f"{self.key}: got {_short(messages)}, expected a list of messages")
        for number, message in enumerate(messages, start=1):
            _check_message(f"{self.key}, message {number}", message)
        return _encode_chat(self.tokenizer, messages, row.get("tools"), self.mask_prompt)


def _encode_chat(
    tokenizer: Any, messages: list[dict], tools: Any, mask_prompt: bool
) -> tuple[list[int], int]:
    """Tokens of the templated conversation, and where its last message begins if masked."""
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"tools: got {_short(tools)}, expected a list of tool descriptions")
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


def _apply_template(tokenizer: Any, messages: list[dict], tools: Any, **options: Any) -> list[int]:
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


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise RowError(f"{place}: got {_short(message)}, expected an object with role and content")
    if not isinstance(message.get("role"), str):
        raise RowError(f"{place}: got the role {_short(message.get('role'))}, expected text")
    content = message.get("content")
    # A message that only calls tools has no content; some templates take a list of parts.
    if not isinstance(content, str | list) and not message.get("tool_calls"):
        raise RowError(f"{place}: got the content {_short(content)}, expected text")


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise RowError(f"got the keys {_keys(row)}, expected {key!r} as in the first row")
    return row[key]


def _string(row: Mapping[str, Any], key: str) -> str:
    value = _value(row, key)
    if not isinstance(value, str):
        raise RowError(f"{key}: got {_short(value)}, expected text")
    return value


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "of an empty object"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
