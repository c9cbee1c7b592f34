"""Rows of a test set as prompts with an expected answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.conversation import Conversation, Message
from mlx_edgelora.data.sets import find_sets


@dataclass(frozen=True)
class AskedRow:
    """A row of the test set.

    Attributes:
        place: its file and line.
        messages: the conversation before the last answer.
        tools: descriptions of tools; None without.
        expected: the last answer.
    """

    place: str
    messages: list[Message]
    tools: list | None
    expected: str


def asked_rows(config: TrainConfig, count: int) -> list[AskedRow]:
    """The first `count` rows of the test set that end with an answer in text.

    Raises:
        EdgeLoraError: the test set is missing, or one of its rows cannot be read.
    """
    return list(islice(_asked_rows(config), count))


def _asked_rows(config: TrainConfig) -> Iterator[AskedRow]:
    for part in find_sets(config).test:
        for number, row in part.rows():
            if not isinstance(row, Conversation) or len(row.messages) < 2:
                continue
            *messages, last = row.messages
            if last["role"] == "assistant" and last["content"]:
                place = f"{part.source.row_name} {number}"
                yield AskedRow(place, messages, row.tools, last["content"])
