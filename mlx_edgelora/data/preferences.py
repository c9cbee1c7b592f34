"""Tokenize rows of preferences: two rows of tokens for each pair, and for each judged answer.

The second row of a judged answer, from which KTO estimates how far the model has moved, is its
prompt with an answer of the next rows that have another prompt; the last rows take the first ones.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from mlx_edgelora.data.conversation import Conversation, Judged, Message, Pair, RowError
from mlx_edgelora.data.dataset import JUDGED, PAIRS, Dataset, Row
from mlx_edgelora.data.encode import Encoder
from mlx_edgelora.data.findings import Findings
from mlx_edgelora.data.sets import Part
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.preferences import KTO


class _Answer(NamedTuple):
    """A judged answer with its place."""

    source: str
    number: int
    judged: Judged

    @property
    def prompt(self) -> tuple[list[Message], object]:
        """The messages before the answer, and the tools."""
        conversation = self.judged.conversation
        return conversation.messages[: conversation.prompt_messages], conversation.tools


def preference_set(
    parts: Sequence[Part], loss: str, encode: Encoder, max_seq_length: int, findings: Findings
) -> Dataset:
    """Tokenize the rows of a loss of preferences.

    Args:
        parts: parts of one set, of rows of `read_preferences` or `read_judged`.
        loss: name of the loss; for KTO, pairs are read as two judged answers.
        encode: labels the answers.
        max_seq_length: limit of a row, in tokens.
        findings: gets remarks on the rows.

    Raises:
        EdgeLoraError: a row is invalid, or no row has a token to train on.
    """
    name = " + ".join(part.name for part in parts)
    build = _judged_rows if loss == KTO else _pair_rows
    rows = build(parts, _Reader(encode, findings))
    return Dataset(rows, max_seq_length, name, findings, JUDGED if loss == KTO else PAIRS)


class _Reader:
    """Encodes conversations at a place.

    Args:
        encode: labels the answers.
        findings: gets remarks on the rows.
    """

    def __init__(self, encode: Encoder, findings: Findings) -> None:
        self._encode, self._findings = encode, findings

    def row(
        self, place: tuple[str, int], conversation: Conversation, desirable: bool, notes: bool
    ) -> Row:
        """One row of tokens, without any if the answer has nothing to train on."""
        source, number = place
        try:
            encoded = self._encode(conversation)
            if len(encoded.pieces) > 1:
                raise RowError(
                    "the chat template writes the first of several answers differently once more "
                    "follow; put all messages but the last answer into the prompt"
                )
        except RowError as error:
            raise EdgeLoraError(f"{source} {number}: {error}") from error
        if notes:
            self._findings.add(f"{source} {number}", encoded.having, encoded.findings)
        tokens, spans = encoded.pieces[0] if encoded.pieces else ([], [])
        return Row(source, number, tokens, spans, desirable)


def _pair_rows(parts: Sequence[Part], reader: _Reader) -> Iterator[Row]:
    for part in parts:
        for number, pair in part.rows():
            place = part.source.row_name, number
            chosen = reader.row(place, pair.chosen, True, True)
            rejected = reader.row(place, pair.rejected, False, True)
            if chosen.tokens and list(chosen.tokens) == list(rejected.tokens):
                raise EdgeLoraError(
                    f"{place[0]} {number}: chosen and rejected become the same tokens, expected "
                    "two different answers; leave the row out"
                )
            yield from (chosen, rejected)


def _judged_rows(parts: Sequence[Part], reader: _Reader) -> Iterator[Row]:
    runs = (list(run) for _, run in groupby(_answers(parts), key=lambda answer: answer.prompt))
    first = before = next(runs, [])
    for run in runs:
        yield from _matched(before, run, reader)
        before = run
    if before is first and first:
        raise EdgeLoraError(
            f"{first[0].source} {first[0].number}: all rows have the same prompt, but kto "
            "compares answers to different ones; add rows with other prompts"
        )
    yield from _matched(before, first, reader)


def _answers(parts: Sequence[Part]) -> Iterator[_Answer]:
    for part in parts:
        for number, row in part.rows():
            place = part.source.row_name, number
            if isinstance(row, Pair):
                yield _Answer(*place, Judged(row.chosen, True))
                yield _Answer(*place, Judged(row.rejected, False))
            else:
                yield _Answer(*place, row)


def _matched(run: Sequence[_Answer], others: Sequence[_Answer], reader: _Reader) -> Iterator[Row]:
    """Rows of answers to one prompt, each with a row of an answer to another prompt."""
    for index, answer in enumerate(run):
        own, place = answer.judged, (answer.source, answer.number)
        yield reader.row(place, own.conversation, own.is_desirable, True)
        other = others[index % len(others)].judged.conversation
        messages = answer.prompt[0] + other.messages[other.prompt_messages :]
        mixed = Conversation(messages, own.conversation.tools, len(answer.prompt[0]))
        yield reader.row(place, mixed, own.is_desirable, False)
