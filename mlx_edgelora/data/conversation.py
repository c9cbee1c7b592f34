"""The canonical form of rows before they are tokenized."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
# Names under which chat templates read the reasoning of a message.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Roles of system prompts.
SYSTEM_ROLES = ("system", "developer")


class RowError(ValueError):
    """An error in a row; the reader of rows adds the file and line to the message."""


@dataclass(frozen=True)
class PlainText:
    """A row without roles.

    Attributes:
        text: text of the row, possibly empty.
    """

    text: str


@dataclass(frozen=True)
class Conversation:
    """A row of messages, in the form that chat templates expect.

    Attributes:
        messages: at least one message. Each has a `role` and a `content`, both text; the content
            may be empty if there are tool calls or reasoning. Optional keys are `tool_calls`, a
            list of at least one `{"type": "function", "function": {"name": text, "arguments":
            object}}`, and the reasoning, as the same text under each of `REASONING_KEYS`. Other
            keys (`name`, `tool_call_id`, `weight`, `train`) are as in the row. No value is null.
        tools: descriptions of tools as in the row, at least one; None without.
        prompt_messages: for a row of prompt and completion, the number of messages of the prompt;
            None for a conversation, in which roles distinguish prompts and answers.
    """

    messages: list[Message]
    tools: list[Mapping[str, Any]] | None = None
    prompt_messages: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        chosen: the prompt with the preferred answer.
        rejected: the same prompt with the other answer.
    """

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class Judged:
    """An answer with a judgement.

    Attributes:
        conversation: the prompt with the answer.
        is_desirable: whether the answer is desirable.
    """

    conversation: Conversation
    is_desirable: bool


CanonicalRow = PlainText | Conversation | Pair | Judged
