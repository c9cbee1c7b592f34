"""Attention of rows that share a row, by calls that know nothing of it.

By ranges: attention is called for each row of the data set as a range of queries and keys. Ranges
of about one length are put side by side as the rows of one call, padded at their ends, where a
causal mask hides what was added. There is no mask between tokens of different rows, because they
never meet in a call.

By pieces, with CUDA: queries are cut into pieces of one length, which is no less than that of the
rows, so that the keys of a piece are its own and those of the piece before it; a mask hides those
of other rows. cuDNN builds a kernel for each shape that attention is called with, forward and
backward, which takes longer than a step: all batches whose rows are as long have one shape.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.masks import simplest_mask

# Ranges are padded to a multiple of this, so that few calls are made.
PAD_TO = 32
# On a GPU, which computes padding fast, to a power of two up to this, or else to a multiple of it,
# and their number is rounded up as well: a step is compiled for each set of shapes.
GPU_PAD_TO = 512
# Of how many tokens a piece is at least. cuDNN computes gradients for a multiple of it.
PIECE = 128
# The masks of pieces take no more, in 16 bits.
MASK_BYTES = 64 * 2**20

# (q [n, H, a, D], k [n, Hkv, b, D], v [n, Hkv, b, Dv], mask) -> [n, H, a, Dv]
Attend = Callable[[mx.array, mx.array, mx.array, mx.array | str | None], mx.array]
# The first token, and the one behind the last.
Between = tuple[int, int]
# Queries, keys, and the window under which they are attended to.
Use = tuple[Between, Between, int | None]


class Pieces(NamedTuple):
    """Queries in pieces, each with its own keys and those of as many tokens before it.

    Attributes:
        queries, keys: which tokens' are given.
        window: how many keys a query sees at most; None for all of its row.
        size: tokens of a piece.
    """

    queries: Between
    keys: Between
    window: int | None
    size: int
    indices = ()

    @property
    def form(self) -> tuple[Hashable, ...]:
        """Equal for batches that do the same with arrays of their own."""
        return (self.size,)

    def attention(
        self, attend: Attend, queries: mx.array, keys: mx.array, values: mx.array, at: mx.array
    ) -> mx.array:
        """Attention as in `Packing.attention`; `at` has of each token its position in its row."""
        (first, stop), (low, _) = self.queries, self.keys
        count = -(-(stop - first) // self.size)
        before, end = self.size if count > 1 else first - low, first + count * self.size
        keys, values = (
            self._with_those_before(_between(x, first - before - low, end - low), count)
            for x in (keys, values)
        )
        # A token sees as many before it as there are in its row; one that pads, itself.
        most = _between(at[:, None, first:stop, None], 0, end - first)
        if self.window is not None:
            most = mx.minimum(most, self.window - 1)
        ago = mx.arange(before, before + self.size)[:, None] - mx.arange(before + self.size)
        mask = (ago >= 0) & (ago <= most.reshape(-1, 1, self.size, 1))
        found = attend(self._cut(_between(queries, 0, end - first), count), keys, values, mask)
        whole = found.reshape(-1, count, *found.shape[1:]).swapaxes(1, 2)
        return whole.flatten(2, 3)[:, :, : stop - first]

    def _cut(self, x: mx.array, count: int) -> mx.array:
        """[B, H, count * size, n] as [B * count, H, size, n]."""
        return x.reshape(*x.shape[:2], count, -1, x.shape[3]).swapaxes(1, 2).flatten(0, 1)

    def _with_those_before(self, x: mx.array, count: int) -> mx.array:
        """Of [B, H, (count + 1) * size, n] each piece but the first, behind the one before it."""
        if count == 1:
            return x
        cut = x.reshape(*x.shape[:2], count + 1, self.size, x.shape[3])
        both = mx.concatenate([cut[:, :, :-1], cut[:, :, 1:]], axis=3)
        return both.swapaxes(1, 2).flatten(0, 1)


def _between(x: mx.array, start: int, stop: int) -> mx.array:
    """Tokens of [B, H, T, n], with zeros where there is none."""
    taken = x[:, :, max(start, 0) : stop]
    front, back = max(-start, 0), stop - max(start, 0) - taken.shape[2]
    return mx.pad(taken, ((0, 0), (0, 0), (front, back), (0, 0))) if front or back else taken


def pieces(
    starts: np.ndarray, queries: Between, keys: Between, window: int | None
) -> Pieces | None:
    """The pieces of some queries; None where their masks would take too much.

    Args:
        starts: as in `Packing`.
        queries, keys: which tokens' are given.
        window: how many keys a query sees at most.
    """
    own = np.arange(*queries) - starts[:, slice(*queries)]
    farthest = int(own.max()) if window is None else min(int(own.max()), window - 1)
    count = queries[1] - queries[0]
    size = max(PIECE, _power_of_two(farthest))
    seen = 2 * size
    if size >= count:
        size = -(-count // PIECE) * PIECE
        seen = queries[0] - keys[0] + size
    taken = 2 * len(starts) * -(-count // size) * size * seen
    return Pieces(queries, keys, window, size) if taken <= MASK_BYTES else None


class _Places:
    """Which tokens the calls take, of B rows of T tokens.

    Args:
        calls: int [ranges, tokens] of each, indices of the B * T; -1 for padding, of a whole range
            too. Every token is in one place or in none.
        rows, tokens: B and T.
    """

    def __init__(self, calls: Sequence[np.ndarray], rows: int, tokens: int) -> None:
        every = np.concatenate([call.reshape(-1) for call in calls])
        back = np.full(rows * tokens, -1)
        back[every[every >= 0]] = np.flatnonzero(every >= 0)
        self.shapes, self._rows, self._tokens = [call.shape for call in calls], rows, tokens
        self._taken, self._put = _Index(every), _Index(back)
        self.indices = [self._taken, self._put]

    def moved(self, x: mx.array) -> list[mx.array]:
        """What each call takes of [B, H, T, n]: [ranges, H, tokens, n].

        Padding repeats some token, and has no gradient: nothing that counts sees it.
        """

        @mx.custom_function
        def move(x: mx.array) -> list[mx.array]:
            return self._cut(self._taken.of(_by_token(x)))

        @move.vjp
        def vjp(_: mx.array, cotangents: list[mx.array], __: list[mx.array]) -> mx.array:
            return self._whole(_flat(cotangents))

        return move(x)

    def put_back(self, pieces: list[mx.array]) -> mx.array:
        """What each call gave, [ranges, H, tokens, n], as [B, H, T, n]."""

        @mx.custom_function
        def put(pieces: list[mx.array]) -> mx.array:
            return self._whole(_flat(pieces))

        @put.vjp
        def vjp(_: list[mx.array], cotangent: mx.array, __: mx.array) -> list[mx.array]:
            return self._cut(self._taken.of(_by_token(cotangent), zeros=True))

        return put(pieces)

    def _cut(self, taken: mx.array) -> list[mx.array]:
        """[m, H, n] as one array for each call."""
        ends = np.cumsum([ranges * tokens for ranges, tokens in self.shapes])[:-1].tolist()
        return [
            piece.reshape(*shape, *piece.shape[1:]).swapaxes(1, 2)
            for piece, shape in zip(mx.split(taken, ends), self.shapes, strict=True)
        ]

    def _whole(self, flat: mx.array) -> mx.array:
        """[m, H, n] in the order of tokens, [B, H, T, n]; zero where a token is in no place."""
        whole = self._put.of(flat, zeros=True)
        return whole.reshape(self._rows, self._tokens, *whole.shape[1:]).swapaxes(1, 2)


class _Index:
    """Rows to take of an array, by their numbers; -1 for none.

    Attributes:
        arrays: the numbers, and which are none if any is.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self.arrays = [mx.array(np.maximum(numbers, 0).astype(np.int32))]
        if (numbers < 0).any():
            self.arrays.append(mx.array(numbers < 0)[:, None, None])

    def of(self, x: mx.array, zeros: bool = False) -> mx.array:
        """Of [m, H, n]; some row, or zeros, for none."""
        numbers, *none = self.arrays
        taken = x[numbers]
        return mx.where(none[0], mx.zeros((), x.dtype), taken) if zeros and none else taken


def _by_token(x: mx.array) -> mx.array:
    """[B, H, T, n] as [B * T, H, n]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _flat(pieces: list[mx.array]) -> mx.array:
    """The arrays of all calls as [m, H, n]."""
    flat = list(map(_by_token, pieces))
    return flat[0] if len(flat) == 1 else mx.concatenate(flat)


class Ranges(NamedTuple):
    """What attention is called for, by ranges.

    Attributes:
        shapes: of each call the queries and the keys of a range, padding included.
        window: how many keys a query sees at most; None for all of its row.
        own: which queries it takes.
        seen: which keys.
    """

    shapes: list[tuple[int, int]]
    window: int | None
    own: _Places
    seen: _Places

    @property
    def indices(self) -> list[_Index]:
        """All that depend on where rows begin."""
        return self.own.indices + self.seen.indices

    @property
    def form(self) -> tuple[Hashable, ...]:
        """All else."""
        counts = [len(index.arrays) for index in self.indices]
        return tuple(self.shapes), tuple(self.own.shapes), tuple(self.seen.shapes), tuple(counts)

    def attention(
        self, attend: Attend, queries: mx.array, keys: mx.array, values: mx.array, _: mx.array
    ) -> mx.array:
        """Attention as in `Packing.attention`."""
        arrays = self.own.moved(queries), self.seen.moved(keys), self.seen.moved(values)
        found = [
            attend(*call, simplest_mask(range(k - q, k), k, self.window))
            for (q, k), *call in zip(self.shapes, *arrays, strict=True)
        ]
        return self.own.put_back(found)


def ranges(starts: np.ndarray, queries: Between, keys: Between, window: int | None) -> Ranges:
    """The ranges of some queries, those of one size together."""
    count, width = queries[1] - queries[0], keys[1] - keys[0]
    found: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for row, own in enumerate(starts[:, slice(*queries)]):
        begins = np.flatnonzero(np.diff(own, prepend=-1))
        for begin, end in zip(begins, [*begins[1:], count], strict=True):
            first, low = queries[0] + begin, int(own[begin])
            if window is not None:
                low = max(low, first - window + 1)
            places = row * count + np.arange(begin, end)
            seen = row * width + np.arange(low, queries[0] + end) - keys[0]
            # Padding is behind all queries; where keys precede them, the last query has the last
            # key, so that there is none.
            size = padded_length(len(places)) if low == first else None
            shape = size or len(places), size or len(seen)
            pair = _padded(places, shape[0]), _padded(seen, shape[1])
            found.setdefault(shape, []).append(pair)
    if mx.default_device() == mx.gpu:
        for shape, pairs in found.items():
            none = np.full(shape[0], -1), np.full(shape[1], -1)
            pairs.extend([none] * (_round_number(len(pairs)) - len(pairs)))
    own, seen = (
        [np.stack([pair[i] for pair in pairs]) for pairs in found.values()] for i in (0, 1)
    )
    rows = len(starts)
    return Ranges(list(found), window, _Places(own, rows, count), _Places(seen, rows, width))


def padded_length(tokens: int) -> int:
    """To how many tokens a range of so many is padded."""
    step = PAD_TO
    if mx.default_device() == mx.gpu:
        step = min(max(_power_of_two(tokens), PAD_TO), GPU_PAD_TO)
    return -(-tokens // step) * step


def _round_number(number: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, ... that is not less."""
    power = _power_of_two(number)
    return 3 * power // 4 if power >= 4 and number <= 3 * power // 4 else power


def _power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()


def _padded(places: np.ndarray, size: int) -> np.ndarray:
    return np.pad(places, (0, size - len(places)), constant_values=-1)
