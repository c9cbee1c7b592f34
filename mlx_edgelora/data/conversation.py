"""The one form that every row takes before it is tokenized."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
# Chat templates read a message's reasoning under one of these names.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# A message of one of these roles is the system prompt.
SYSTEM_ROLES = ("system", "developer")


class RowError(ValueError):
    """What is wrong with a row; the reader of the rows knows its place."""


@dataclass(frozen=True)
class PlainText:
    """A row without roles.

    Attributes:
        text: as the row has it, possibly empty.
    """

    text: str


@dataclass(frozen=True)
class Conversation:
    """A row of messages, in the form that chat templates expect.

    Attributes:
        messages: at least one. Each has `role` and `content`, both text; the content is empty
            where the row has none beside tool calls or reasoning. Where the row has them:
            `tool_calls`, at least one `{"type": "function", "function": {"name": text,
            "arguments": object}}`, and the reasoning as text, the same under each of
            `REASONING_KEYS`. Other keys (`name`, `tool_call_id`, `weight`, `train`) are as in the
            row. No value is null.
        tools: descriptions of tools as the row has them, at least one; None without.
        prompt_messages: for a row of prompt and completion, how many of the messages are its
            prompt; None for a conversation, where roles alone tell.
    """

    messages: list[Message]
    tools: list[Mapping[str, Any]] | None = None
    prompt_messages: int | None = None


CanonicalRow = PlainText | Conversation
