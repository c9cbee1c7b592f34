"""Rows of preferences, as TRL has them: pairs of answers, and answers with a judgement."""

from typing import Any

from mlx_edgelora.data.cells import Cells, conversation_of, messages_of
from mlx_edgelora.data.conversation import Judged, Message, Pair, RowError
from mlx_edgelora.data.messages import short

ANSWERS = ("chosen", "rejected")
ASSISTANT = "assistant"


def read_preferences(cells: Cells) -> Pair:
    """Read `chosen` and `rejected` with their `prompt`, or as two whole conversations.

    Raises:
        RowError: an answer is missing or invalid, or both are the same.
    """
    chosen, rejected = (_messages(cells, part) for part in ANSWERS)
    if _is_prompt_apart(cells, chosen, rejected):
        prompt = messages_of(cells, "prompt", "user")
    else:
        prompt = _common(cells, chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if chosen == rejected:
        raise RowError(
            f"{cells.columns['chosen']} and {cells.columns['rejected']} are the same answer, "
            "expected two different ones; leave the row out"
        )
    for part, answer in zip(ANSWERS, (chosen, rejected), strict=True):
        _check_answer(cells.columns[part], answer)
    return Pair(*(conversation_of(cells, prompt + a, len(prompt)) for a in (chosen, rejected)))


def read_judged(cells: Cells) -> Judged:
    """Read a prompt, its completion and a `label`, which is true for a desirable completion.

    Raises:
        RowError: a part is missing or invalid.
    """
    prompt = messages_of(cells, "prompt", "user")
    completion = messages_of(cells, "completion", ASSISTANT)
    _check_answer(cells.columns["completion"], completion)
    label = _read_label(cells.columns["label"], cells.values["label"])
    return Judged(conversation_of(cells, prompt + completion, len(prompt)), label)


def _read_label(column: str, value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # as in a CSV file
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise RowError(
            f"{column}: got {short(value)}, expected true for a desirable completion or false"
        )
    return value


def _messages(cells: Cells, part: str) -> list[Message]:
    """The messages of an answer, or of a whole conversation."""
    value = cells.values[part]
    if value is None or value == []:
        raise RowError(f"{cells.columns[part]}: got {short(value)}, expected an answer")
    return messages_of(cells, part, ASSISTANT)


def _is_prompt_apart(cells: Cells, chosen: list[Message], rejected: list[Message]) -> bool:
    """Whether the prompt is in a column of its own and not also in the answers."""
    if "prompt" not in cells.values:
        return False
    prompt, answers = cells.values["prompt"], (chosen, rejected)
    # Some sets repeat the prompt as text beside two whole conversations.
    is_text = isinstance(prompt, str) and not any(
        isinstance(cells.values[part], str) for part in ANSWERS
    )
    return not (is_text and all(messages[0]["role"] != ASSISTANT for messages in answers))


def _common(cells: Cells, chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages with which two conversations begin."""
    if any(isinstance(cells.values[part], str) for part in ANSWERS):
        raise RowError(
            f"{cells.columns['chosen']}: got text without a prompt, expected a column 'prompt', or "
            "whole conversations as lists of messages"
        )
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    if not count:
        raise RowError(
            f"{cells.columns['chosen']} and {cells.columns['rejected']} begin with different "
            "messages, expected two conversations with the same prompt, or a column 'prompt'"
        )
    return chosen[:count]


def _check_answer(column: str, answer: list[Message]) -> None:
    if not answer:
        raise RowError(f"{column}: has no answer behind the prompt, expected one")
    if answer[0]["role"] != ASSISTANT:
        raise RowError(
            f"{column}: its answer begins with a message of the {answer[0]['role']}, expected one "
            "of the assistant"
        )
    if not any(message["content"].strip() or message.get("tool_calls") for message in answer):
        raise RowError(f"{column}: got an empty answer, expected text")
