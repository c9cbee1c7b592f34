"""Find the answers of a conversation in its tokens.

An answer follows the prompt of its generation: the conversation before it, rendered with the
opening of an answer. This prompt is searched for in the rendering of the whole conversation. There
a template may write an earlier answer differently (Qwen 3 and DeepSeek-R1 remove its reasoning,
gpt-oss ends it with another token), or its prompt (Mistral puts the system message into the last
user turn). The conversation up to such an answer becomes a row of its own, in which only that
answer is labelled. So every answer is trained in the form in which it is generated.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mlx_edgelora.data.content import holds, parts_of, squeezed
from mlx_edgelora.data.conversation import Conversation, RowError
from mlx_edgelora.data.findings import REASONING
from mlx_edgelora.data.template import Template

_DIFFERS = (
    "the chat template writes the prompt differently when the answer follows, so the two cannot "
    "be told apart; use --train-on everything or change the template"
)


@dataclass
class Piece:
    """A rendering of the first messages of a conversation, and the answers to train in it.

    Attributes:
        text: the rendered text.
        tokens: tokens of the text.
        shown: number of messages in the text.
        spans: (start, stop) of the tokens of each answer, by the index of its message.
        joined: whether the prompt and the answer come from two renderings.
        ends: end of each token in the text, in characters; None if unknown.
    """

    text: str
    tokens: list[int]
    shown: int
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    joined: bool = False
    ends: list[int] | None = None


class Answers:
    """Finds the answers in renderings of one conversation.

    Attributes:
        opening: text that generation adds before an answer, but the rendering does not contain.
    """

    def __init__(self, template: Template, row: Conversation) -> None:
        self._template, self._row = template, row
        self._messages = row.messages
        self.opening = ""
        self._masks: dict[int, list[bool]] = {}

    def pieces(self, wanted: Sequence[int]) -> list[Piece]:
        """Pieces that contain each wanted answer once, in the form in which it is generated.

        Args:
            wanted: indices of messages in ascending order; at least one.

        Raises:
            RowError: the template refuses the messages, or an answer cannot be found.
        """
        whole = self._piece(wanted[-1] + 1)
        self._template.check(self._messages[: whole.shown], self._row.tools, whole.tokens)
        apart = []
        for number in wanted:
            span = self._in_whole(whole, number)
            if span is None:
                apart.append(self._alone(number, whole if number == wanted[-1] else None))
            else:
                whole.spans[number] = span
        return apart + ([whole] if whole.spans else [])

    def prompt(self, number: int) -> str:
        """The text from which the answer of message `number` is generated."""
        if number == 0:
            return ""
        return self._template.text(self._messages[:number], self._row.tools, generate=True)

    def region(self, piece: Piece, number: int) -> tuple[int, int]:
        """(start, stop) of the tokens of a message in a rendering of the whole conversation.

        Raises:
            RowError: the template writes the message differently if more messages follow.
        """
        before = self._template.text(self._messages[:number], self._row.tools)
        behind = self._template.text(self._messages[: number + 1], self._row.tools)
        if not (piece.text.startswith(before) and piece.text.startswith(behind)):
            raise RowError(_DIFFERS)
        return self._up_to(piece, before), self._up_to(piece, behind)

    def _piece(self, shown: int) -> Piece:
        text = self._template.text(self._messages[:shown], self._row.tools)
        return self._tokenized(text, shown)

    def _tokenized(self, text: str, shown: int, joined: bool = False) -> Piece:
        tokens, ends = self._template.tokens_and_ends(text)
        return Piece(text, tokens, shown, joined=joined, ends=ends)

    def _in_whole(self, whole: Piece, number: int) -> tuple[int, int] | None:
        """Span of an answer in the whole conversation; None if generation writes it differently."""
        prompt = self.prompt(number)
        start = self._start(whole, number, prompt)
        if start is None:
            return None
        if number == whole.shown - 1:
            return self._refined(whole, start, len(whole.tokens))
        text = self._template.text(self._messages[: number + 1], self._row.tools)
        if whole.text.startswith(text):
            return self._refined(whole, start, self._up_to(whole, text))
        alone = self._tokenized(text, number + 1)
        stop = self._stop(whole, alone, prompt)
        if stop is None or stop <= start:
            return None
        if self._loses(number, whole.tokens[start:stop], alone.tokens[start:]):
            return None
        return self._refined(whole, start, stop)

    def _loses(self, number: int, written: list[int], alone: list[int]) -> bool:
        """Whether an answer lacks content, or an end, that it has as the last message."""
        if self._stops(alone) and not self._stops(written):
            return True
        parts = list(parts_of(self._messages, number))
        if written[:1] != alone[:1] and any(part.kind is REASONING for part in parts):
            return True
        missing = holds(parts, self._template.decode(written))
        return len(missing) > len(holds(parts, self._template.decode(alone)))

    def _stop(self, whole: Piece, alone: Piece, prompt: str) -> int | None:
        """End of an answer that the whole conversation renders differently; None if not found."""
        same = self._up_to(whole, whole.text[: _common(whole.text, alone.text)])
        if same > self._up_to(whole, prompt):
            return same
        # The template may write an empty block of reasoning before the last answer only.
        if not (whole.text.startswith(prompt) and alone.text.startswith(prompt)):
            return None
        answer = alone.text[len(prompt) :]
        for at in range(1, len(answer)):
            if whole.text.startswith(answer[at:], len(prompt)):
                return self._up_to(whole, prompt + answer[at:])
        return None

    def _start(self, piece: Piece, number: int, prompt: str) -> int | None:
        """The first token of an answer in a rendering; None if its prompt differs there."""
        if number == 0:
            return self._up_to(piece, self._header())
        if piece.text.startswith(prompt):
            return self._up_to(piece, prompt)
        # A template may open an answer differently for generation, such as with a thinking tag.
        # Then their common beginning is the prompt, but it must contain all earlier messages.
        bare = self._template.text(self._messages[:number], self._row.tools)
        if not piece.text.startswith(bare):
            return None
        start = max(self._up_to(piece, prompt), self._up_to(piece, bare))
        self.opening = prompt[_common(piece.text, prompt) :]
        return start

    def _header(self) -> str:
        """The text that the template writes before an answer that is the first message."""
        alone, asked = self._template.text(self._messages[:1], self._row.tools), self._asking()
        if asked and asked in alone:
            return alone[: alone.index(asked) + len(asked)]
        for part in parts_of(self._messages, 0):
            text = self._template.text([part.replaced()], self._row.tools)
            header = text.partition(part.words[0])[0]
            if header != text and alone.startswith(header):
                return header
        return ""

    def _asking(self) -> str:
        """The opening of an answer that generation adds after a user's message."""
        user = [{"role": "user", "content": "."}]
        bare = self._template.text(user, None)
        asked = self._template.text(user, None, generate=True)
        return asked[len(bare) :] if asked.startswith(bare) else ""

    def _alone(self, number: int, whole: Piece | None) -> Piece:
        """A piece of the conversation up to an answer, in which only that answer is trained."""
        piece = whole or self._piece(number + 1)
        prompt = self.prompt(number)
        start = self._start(piece, number, prompt)
        if start is None:
            joined = self._joined(piece, number, prompt)
            if joined is not None:
                return joined
            start = self._last_marked(piece)
        alone = replace(piece, spans={})
        alone.spans[number] = self._refined(alone, start, len(alone.tokens))
        return alone

    def _joined(self, piece: Piece, number: int, prompt: str) -> Piece | None:
        """Join the prompt of generation and the answer, which is cut out of its rendering.

        The answer begins where the text before it has the longest common ending with the prompt.
        This ending must contain the last message of the prompt, otherwise None is returned.
        """
        best, last = (0, 0), prompt[-1:]
        at = piece.text.find(last) if last else -1
        while at >= 0:
            best = max(best, (_common(prompt[::-1], piece.text[at::-1]), at + 1))
            at = piece.text.find(last, at + 1)
        length, cut = best
        same = prompt[len(prompt) - length :]
        before = list(parts_of(self._messages, number - 1))
        answer = piece.text[cut:]
        if holds(before, same) or not squeezed(same):
            return None
        text = prompt + answer
        joined = self._tokenized(text, piece.shown, joined=True)
        first = self._up_to(piece, piece.text[:cut])
        start, stop = self._refined(piece, first, len(piece.tokens))
        joined.spans[number] = (
            self._up_to(joined, prompt) + start - first,
            len(joined.tokens) + stop - len(piece.tokens),
        )
        return joined

    def _last_marked(self, piece: Piece) -> int:
        """The first token of the last answer, according to the template's own mask."""
        mask = self._mask(piece)
        if True not in mask:
            raise RowError(_DIFFERS)
        last = len(mask) - 1 - mask[::-1].index(True)
        return last + 1 - [*mask[last::-1], False].index(False)

    def _refined(self, piece: Piece, start: int, stop: int) -> tuple[int, int]:
        """The span limited to the assistant's tokens, if the template has a mask of them."""
        mask = self._mask(piece)
        marked = [at for at in range(start, min(stop, len(mask))) if mask[at]]
        if not marked:
            return start, stop
        last = marked[-1] + 1
        if not self._stops(piece.tokens[marked[0] : last]):  # the mask lacks the end of the turn
            ends = [at for at in range(last, stop) if piece.tokens[at] in self._template.stops]
            last = ends[0] + 1 if ends else stop
        return marked[0], last

    def _stops(self, tokens: Sequence[int]) -> bool:
        return not self._template.stops.isdisjoint(tokens)

    def _mask(self, piece: Piece) -> list[bool]:
        """The template's mask of the assistant's tokens in a rendering; empty if unknown."""
        if piece.shown not in self._masks:
            mask = self._template.assistant_mask(
                self._messages[: piece.shown], self._row.tools, piece.tokens
            )
            self._masks[piece.shown] = mask or []
        return self._masks[piece.shown]

    def _up_to(self, piece: Piece, text: str) -> int:
        """The number of tokens at the beginning of a piece that are those of a text."""
        if piece.ends is not None and piece.text.startswith(text):
            return bisect_right(piece.ends, len(text))
        tokens = self._template.tokens(text)
        for position, (a, b) in enumerate(zip(tokens, piece.tokens, strict=False)):
            if a != b:
                return position
        return min(len(tokens), len(piece.tokens))


def _common(left: str, right: str) -> int:
    """The length of the common beginning of two texts, in characters."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
