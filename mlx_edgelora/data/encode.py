"""Encode canonical rows as tokens and labelled spans, and find lost contents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_edgelora.data import findings
from mlx_edgelora.data.answers import Answers, Piece
from mlx_edgelora.data.content import Part, Search, holds, parts_of, squeezed
from mlx_edgelora.data.conversation import CanonicalRow, Conversation, Message, PlainText, RowError
from mlx_edgelora.data.findings import Finding, Kind
from mlx_edgelora.data.template import Template

ANSWERS, LAST_ANSWER, EVERYTHING = "answers", "last-answer", "everything"
TRAIN_ON = (ANSWERS, LAST_ANSWER, EVERYTHING)
ASSISTANT = "assistant"
# Number of last tokens in which the end of an answer is searched for: a token that ends
# generation, perhaps with a line break.
_ENDING = 4

Spans = list[tuple[int, int]]


@dataclass
class Encoded:
    """An encoded row.

    Attributes:
        pieces: pairs of tokens and labelled spans. There are none if the row is left out, and
            several if earlier answers are written differently in the whole conversation.
        having: kinds of content in the row that can be lost.
        findings: remarks on the row.
    """

    pieces: list[tuple[list[int], Spans]] = field(default_factory=list)
    having: set[Kind] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


class Encoder:
    """Encodes rows with a tokenizer.

    Args:
        tokenizer: a tokenizer of `mlx_lm.load`.
        train_on: one of `TRAIN_ON`.
        option: the user's option that selected `train_on`, for messages.
    """

    def __init__(self, tokenizer: Any, train_on: str, option: str) -> None:
        self._tokenizer, self._train_on, self._option = tokenizer, train_on, option
        self._template = Template(tokenizer)
        self._search = Search()
        unknown = getattr(tokenizer, "unk_token_id", None)
        others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "pad")}
        self._unknown = None if unknown in others | self._template.stops else unknown

    def __call__(self, row: CanonicalRow) -> Encoded:
        """Encode a row.

        Raises:
            RowError: the row has an error that the user can fix.
        """
        encoded = self._text(row) if isinstance(row, PlainText) else self._conversation(row)
        encoded.pieces = [self._once(tokens, spans) for tokens, spans in encoded.pieces]
        self._note_unknown(encoded)
        return encoded

    def _text(self, row: PlainText) -> Encoded:
        """Encode plain text, with the end-of-sequence token at its end."""
        if self._train_on != EVERYTHING:
            raise RowError(
                f"got a row of plain text, which has no prompt, with {self._option}; leave it "
                "out or use rows of prompts and completions or of messages"
            )
        if not squeezed(row.text):
            return Encoded(findings=[Finding(findings.NO_TEXT)])
        begin = getattr(self._tokenizer, "bos_token", None)
        adds = not (begin and row.text.startswith(begin))
        tokens = list(self._tokenizer.encode(row.text, add_special_tokens=adds))
        end = self._template.end
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        return Encoded([(tokens, [(0, len(tokens))])])

    def _conversation(self, row: Conversation) -> Encoded:
        encoded = Encoded()
        first = row.prompt_messages or 0
        answers = [
            number
            for number, message in enumerate(row.messages)
            if message["role"] == ASSISTANT and number >= first
        ]
        filled = [number for number in answers if any(parts_of(row.messages, number))]
        if len(filled) < len(answers):
            encoded.findings.append(Finding(findings.EMPTY))
        trained = [number for number in filled if _is_trained(row.messages[number])]
        if self._train_on == EVERYTHING:
            if answers and not filled:
                return encoded
            return self._everything(encoded, row, set(answers) - set(filled))
        wanted = trained
        if self._train_on == LAST_ANSWER:
            wanted = [number for number in trained if number == answers[-1]]
            if len(trained) > len(wanted) > 0:
                encoded.findings.append(Finding(findings.EARLIER))
        if not wanted:
            if not answers:
                roles = ", ".join(dict.fromkeys(message["role"] for message in row.messages))
                encoded.findings.append(Finding(findings.NO_ANSWER, f"roles {roles}"))
            return encoded
        if answers[-1] < len(row.messages) - 1:
            shown = row.messages[-1].get("content") or row.messages[-1]["role"]
            encoded.findings.append(Finding(findings.UNANSWERED, shown))
        self._answers(encoded, row, wanted)
        return encoded

    def _answers(self, encoded: Encoded, row: Conversation, wanted: Sequence[int]) -> None:
        found = Answers(self._template, row)
        pieces = found.pieces(wanted)
        if found.opening:
            encoded.findings.append(Finding(findings.OPENING, found.opening))
        if len(pieces) > 1:
            encoded.findings.append(Finding(findings.APART))
        for piece in pieces:
            self._note_lost(encoded, row, piece, set(wanted))
            spans = sorted(piece.spans.values())
            if spans[-1][1] == len(piece.tokens):
                spans[-1] = self._ended(encoded, piece.tokens, spans[-1])
            encoded.pieces.append((piece.tokens, spans))

    def _everything(self, encoded: Encoded, row: Conversation, empty: set[int]) -> Encoded:
        """Label all tokens except those of messages that are not to be trained."""
        text = self._template.text(row.messages, row.tools)
        tokens = self._template.encoded(row.messages, row.tools)
        piece = Piece(text, tokens, len(row.messages))
        left_out = {
            number
            for number, message in enumerate(row.messages)
            if number in empty or not _is_trained(message)
        }
        found = Answers(self._template, row)
        spans = [(0, len(piece.tokens))]
        for number in sorted(left_out):
            start, stop = found.region(piece, number)
            spans[-1:] = [(spans[-1][0], start), (stop, len(piece.tokens))]
        self._note_lost(encoded, row, piece, set())
        last = len(row.messages) - 1
        if row.messages[last]["role"] == ASSISTANT and last not in left_out:
            start = max(spans[-1][0], len(piece.tokens) - _ENDING)
            _, stop = self._ended(encoded, piece.tokens, (start, len(piece.tokens)))
            spans[-1] = (spans[-1][0], stop)
        encoded.pieces.append((piece.tokens, [(a, b) for a, b in spans if a < b]))
        return encoded

    def _ended(self, encoded: Encoded, tokens: list[int], span: tuple[int, int]) -> tuple[int, int]:
        """The span of the last answer; the end-of-sequence token is added if none ends it."""
        if not self._template.stops.isdisjoint(tokens[slice(*span)]):
            return span
        if self._template.end is None:
            encoded.findings.append(Finding(findings.NEVER_ENDS))
            return span
        encoded.findings.append(Finding(findings.ADDED_END))
        tokens.append(self._template.end)
        return span[0], len(tokens)

    def _note_lost(
        self,
        encoded: Encoded,
        row: Conversation,
        piece: Piece,
        wanted: set[int],
    ) -> None:
        """Add findings for contents missing from the tokens, or from the labels of their answer.

        Reasoning of an earlier answer in `wanted` is not missing: it is in another piece.
        """
        shown = row.messages[: piece.shown]
        for number in range(piece.shown):
            encoded.having.update(
                part.kind
                for part in parts_of(shown, number)
                if part.kind is not findings.REASONING or self._is_label(piece, number)
            )
        if row.tools:
            encoded.having.add(findings.TOOLS)
        lost = self._missing(row, piece)
        for number, (start, stop) in piece.spans.items():
            decoded = self._template.decode(piece.tokens[start:stop])
            if self._unknown not in piece.tokens[start:stop]:
                lost += holds(list(parts_of(shown, number)), decoded)
        for part in lost:
            kind = part.kind
            if kind is findings.REASONING and not self._is_label(piece, part.message):
                if part.message in wanted:
                    continue
                kind = findings.CUT_EARLIER
            encoded.findings.append(Finding(kind, "".join(part.texts[:1])))

    def _is_label(self, piece: Piece, number: int) -> bool:
        """Whether a message is trained in this piece, and not only part of the prompt."""
        return number in piece.spans or (not piece.spans and number == piece.shown - 1)

    def _missing(self, row: Conversation, piece: Piece) -> list[Part]:
        """Parts of messages that are missing from the text of a piece."""
        template, missing, tools = self._template, self._search.missing, row.tools
        messages = row.messages[: piece.shown]
        if not piece.joined:
            return missing(messages, tools, piece.text, template.text, "whole")

        def prompt(messages: Sequence[Message], tools: Any) -> str:
            return template.text(messages, tools, generate=True)

        last = piece.shown - 1
        return missing(messages[:-1], tools, piece.text, prompt, "prompt") + missing(
            messages, None, piece.text, template.text, "answer", first=last
        )

    def _once(self, tokens: list[int], spans: Spans) -> tuple[list[int], Spans]:
        """Remove a repeated beginning-of-sequence token at the start."""
        begin = getattr(self._tokenizer, "bos_token_id", None)
        extra = 0
        while begin is not None and tokens[extra : extra + 2] == [begin, begin]:
            extra += 1
        if not extra:
            return tokens, spans
        return tokens[extra:], [(max(0, a - extra), b - extra) for a, b in spans if b > extra]

    def _note_unknown(self, encoded: Encoded) -> None:
        if self._unknown is None:
            return
        for tokens, _ in encoded.pieces:
            if self._unknown in tokens:
                at = tokens.index(self._unknown)
                near = self._template.decode(tokens[max(0, at - 4) : at + 4])
                encoded.findings.append(Finding(findings.UNKNOWN, near))
                return


def _is_trained(message: Message) -> bool:
    """Whether a message is trained according to its keys `weight` and `train`.

    Raises:
        RowError: a value is neither 0 nor 1, true nor false.
    """
    for key in ("weight", "train"):
        value = message.get(key, 1)
        if isinstance(value, str) or value not in (0, 1):
            raise RowError(f"{key} of a message: got {value!r}, expected 0 or 1, or true or false")
        if not value:
            return False
    return True


def rows_of(encoded: Encoded) -> Iterator[tuple[list[int], Spans]]:
    """The pieces of a row; a row that is left out yields one without tokens, to be counted."""
    yield from encoded.pieces or [([], [])]
