"""The texts around the turns of a chat template, found by rendering it.

Other programs have template languages of their own. A template that writes each turn as a text
before it, its content and a text after it is described by those texts, whatever its program says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_edgelora.data.conversation import Message
from mlx_edgelora.errors import EdgeLoraError

# Contents that no template contains.
_SYSTEM, _FIRST, _ANSWER, _SECOND, _LAST = "Qsyst7", "Qask1", "Qansw2", "Qask3", "Qansw4"
Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class ChatTurns:
    """The texts that a chat template writes.

    Attributes:
        user: before and after what a user says.
        assistant: before and after an answer.
        answer: what the template writes for the model to go on from.
        system: before and after a system message; None if it is part of a user's turn.
        default: what comes first in a conversation without a system message.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    system: tuple[str, str] | None
    default: str

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation as the template writes it, up to the next answer."""
        around = {"user": self.user, "assistant": self.assistant, "system": self.system}
        parts = [] if messages[0]["role"] == "system" else [self.default]
        for message in messages:
            before, after = around[message["role"]]
            parts.append(f"{before}{message['content']}{after}")
        return "".join(parts) + self.answer


def find_turns(render: Render, place: str) -> ChatTurns:
    """Find the texts around turns, and compare them with longer conversations.

    Args:
        render: the template, given messages and whether an answer is to follow; without the
            token that begins a sequence.
        place: named in errors.

    Raises:
        EdgeLoraError: the template does more than to write texts around turns.
    """
    unknown = EdgeLoraError(
        f"{place}: the chat template does not write fixed texts around its turns, which Ollama's "
        "templates need; write model.gguf with mlx-edgelora export gguf --fused, which holds the "
        "template itself, and a Modelfile of your own"
    )
    first = _messages(_FIRST)
    try:
        head, user_after = render(first, False).split(_FIRST)
        whole = render(_messages(_FIRST, _ANSWER, _SECOND), True)
        _, rest = whole.split(_FIRST)
        between, rest = rest.split(_ANSWER)
        after, end = rest.split(_SECOND)
        _, assistant_after = render(_messages(_FIRST, _ANSWER), False).split(_ANSWER)
        user_before = after.removeprefix(assistant_after)
        turns = ChatTurns(
            (user_before, user_after),
            (between.removeprefix(user_after), assistant_after),
            end.removeprefix(user_after),
            _system(render, user_before),
            head.removesuffix(user_before),
        )
    except ValueError as error:  # a content is missing, or is there twice
        raise unknown from error
    checks = [_messages(_FIRST), _messages(_FIRST, _ANSWER, _SECOND, _LAST, _FIRST)]
    if turns.system is not None:
        checks += [[{"role": "system", "content": _SYSTEM}, *check] for check in checks]
    if any(turns.text(check) != render(check, True) for check in checks):
        raise unknown
    return turns


def _messages(*contents: str) -> list[Message]:
    roles = "user", "assistant"
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def _system(render: Render, user_before: str) -> tuple[str, str] | None:
    message = {"role": "system", "content": _SYSTEM}
    try:
        before, rest = render([message, *_messages(_FIRST)], False).split(_SYSTEM)
        after, _ = rest.split(_FIRST)
    except ValueError:  # refused by the template, or left out
        return None
    if not after.endswith(user_before) or (user_before and before.startswith(user_before)):
        return None
    return before, after.removesuffix(user_before)
