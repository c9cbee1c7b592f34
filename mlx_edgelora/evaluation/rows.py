"""Rows of a data set as prompts with an expected answer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from mlx_edgelora.data.conversation import Conversation, Message, Pair
from mlx_edgelora.data.sets import Part


@dataclass(frozen=True)
class AskedRow:
    """A row of a data set.

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


def asked_rows(parts: Iterable[Part], count: int) -> list[AskedRow]:
    """The first `count` rows that end with an answer in text, of parts of `find_sets`.

    Raises:
        EdgeLoraError: a row cannot be read.
    """
    return list(islice(_asked_rows(parts), count))


def _asked_rows(parts: Iterable[Part]) -> Iterator[AskedRow]:
    for part in parts:
        for number, found in part.rows():
            row = found.chosen if isinstance(found, Pair) else found
            if not isinstance(row, Conversation) or len(row.messages) < 2:
                continue
            *messages, last = row.messages
            if last["role"] == "assistant" and last["content"]:
                place = f"{part.source.row_name} {number}"
                yield AskedRow(place, messages, row.tools, last["content"])
