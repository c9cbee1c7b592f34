"""The values of a row by the parts that its columns hold, and the messages made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_edgelora.data.conversation import SYSTEM_ROLES, Conversation, Message, RowError
from mlx_edgelora.data.messages import (
    is_message,
    read_content,
    read_messages,
    read_tools,
    with_reasoning,
)


@dataclass(frozen=True)
class Cells:
    """The values of a row by part, with their columns for error messages."""

    values: Mapping[str, Any]
    columns: Mapping[str, str]
    system_prompt: str | None

    def content(self, part: str) -> tuple[str, str | None]:
        """The text of a part, and its reasoning or None."""
        return read_content(self.columns[part], self.values[part])

    def optional_text(self, part: str) -> str | None:
        """The text of an optional part; None if the row does not have it."""
        return self.content(part)[0] if part in self.values else None


def messages_of(cells: Cells, part: str, role: str) -> list[Message]:
    """The messages of a part, whose text is a message of a role."""
    place, value = cells.columns[part], cells.values[part]
    if is_message(value):
        return read_messages(place, [value])
    if isinstance(value, list) and value and all(map(is_message, value)):
        return read_messages(place, value)
    content, reasoning = cells.content(part)
    return [with_reasoning({"role": role, "content": content}, reasoning)]


def conversation_of(
    cells: Cells, messages: list[Message], prompt_messages: int | None = None
) -> Conversation:
    """A conversation with the row's own system prompt, or else that of the run."""
    own = cells.optional_text("system")
    has_system = any(message["role"] in SYSTEM_ROLES for message in messages)
    if own is not None and has_system and messages[0]["content"] != own:
        raise RowError(
            f"{cells.columns['system']}: has a system prompt, and so have its messages; keep one"
        )
    system = cells.system_prompt if own is None else own
    if system is not None and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
        prompt_messages = None if prompt_messages is None else prompt_messages + 1
    tools = None
    if "tools" in cells.values:
        tools = read_tools(cells.columns["tools"], cells.values["tools"])
    return Conversation(messages, tools, prompt_messages)
