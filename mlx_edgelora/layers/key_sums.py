"""Sums of the gradients of keys and values over calls of attention, in pieces of tokens.

Each tile of queries has a gradient for all keys that it sees. Added to one array, it would be there
whole beside the sums. So the sums are pieces of some heads and `PIECE` tokens, to which attention
adds the gradient of one tile of keys at a time: a sum of two arrays that reuses the memory of one.

With a window the sums are those of some tokens. A call that sees others as well leaves behind what
their gradients are made of (`KeyCall`), and is added to them when the window has moved there
(`grid.add_to_keys`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_edgelora.layers.tile_order import Span

# Tokens of a piece.
PIECE = 512


class KeyCall(NamedTuple):
    """What the gradients of keys and values of one call are made of, besides these.

    Attributes:
        spec: settings of the call (`grid.AttentionSpec`), without sinks.
        arrays: queries and the gradient of the output [B, H, Tq, n]; maximum and sum of the
            softmax, and the output times its gradient [B, H, Tq, 3].
    """

    spec: Any
    arrays: tuple[mx.array, mx.array, mx.array]


class KeySums:
    """Float32 sums of the gradients of keys and values, to which calls of attention add.

    Memory: the pieces that a gradient has reached and that are not dropped. With a window, those of
    its tokens.

    Args:
        batch, heads: shape of the keys.
        sizes: sizes of a key and of a value.

    Attributes:
        start: the first token that the next call sees.
        used: whether a call has added to the sums since this was set to False.
        window: the tokens whose sums are made; None for all. Calls without a mask array keep to it.
        calls: gets those that see tokens before the window.
    """

    def __init__(self, batch: int, heads: int, sizes: tuple[int, int]) -> None:
        self.start, self.used = 0, False
        self.window: Span | None = None
        self.calls: list[KeyCall] = []
        self._shape, self._sizes = (batch, heads), sizes
        self._heads: list[Span] = []
        # By 0 for keys and 1 for values, first head, and number of the piece in its row.
        self._pieces: dict[tuple[int, int, int], mx.array] = {}

    @property
    def arrays(self) -> list[mx.array]:
        """All pieces."""
        return list(self._pieces.values())

    def add(self, index: int, gradient: mx.array, heads: Sequence[Span], first: Span) -> mx.array:
        """Add the gradients of some heads and tokens; returns a sum with them.

        Args:
            index: 0 for keys, 1 for values.
            gradient: [n, tokens, size].
            heads: the heads that are given together, over the batch. Pieces have those of the
                first call.
            first: the first head, over the batch, and the first token after `start`.
        """
        self.used = True
        self._heads = self._heads or list(heads)
        (head, token), (count, tokens, _) = first, gradient.shape
        token += self.start
        gradient, total = gradient.astype(mx.float32), gradient
        for low, high in self._heads:
            rows = _overlap((low, high), (head, head + count))
            if rows is None:
                continue
            for number, columns in _pieces((token, token + tokens)):
                part = gradient[
                    rows[0] - head : rows[1] - head, columns[0] - token : columns[1] - token
                ]
                begin = number * PIECE
                around = [
                    (rows[0] - low, high - rows[1]),
                    (columns[0] - begin, begin + PIECE - columns[1]),
                    (0, 0),
                ]
                if any(map(any, around)):
                    part = mx.pad(part, around)
                key = index, low, number
                total = part if key not in self._pieces else self._pieces[key] + part
                self._pieces[key] = total
        return total

    def add_whole(self, gradients: Sequence[mx.array]) -> None:
        """Add gradients [B, Hkv, tokens, n] of keys and values for the tokens from `start` on."""
        for index, gradient in enumerate(gradients):
            flat = gradient.reshape(-1, *gradient.shape[2:])
            self.add(index, flat, [(0, len(flat))], (0, 0))

    def tokens(self, start: int, stop: int) -> list[mx.array]:
        """The sums of some tokens, [B, Hkv, stop - start, n] twice."""
        return [
            mx.concatenate(
                [
                    mx.concatenate(list(self._parts(index, heads, (start, stop))), axis=1)
                    for heads in self._heads
                ]
            ).reshape(*self._shape, stop - start, self._sizes[index])
            for index in (0, 1)
        ]

    def drop(self, start: int) -> None:
        """Drop the pieces whose tokens are all from `start` on."""
        for key in [key for key in self._pieces if key[2] * PIECE >= start]:
            del self._pieces[key]

    def _parts(self, index: int, heads: Span, tokens: Span) -> Iterator[mx.array]:
        low, high = heads
        for number, (start, stop) in _pieces(tokens):
            piece, begin = self._pieces.get((index, low, number)), number * PIECE
            if piece is None:
                yield mx.zeros((high - low, stop - start, self._sizes[index]))
            else:
                yield piece[:, start - begin : stop - begin]


def _pieces(tokens: Span) -> Iterator[tuple[int, Span]]:
    """The pieces with some tokens: their numbers and the tokens in them."""
    for number in range(tokens[0] // PIECE, -(-tokens[1] // PIECE)):
        yield number, _overlap(tokens, (number * PIECE, (number + 1) * PIECE))


def _overlap(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None
