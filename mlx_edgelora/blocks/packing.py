"""Rows that share a row of a batch: each attends to itself alone, and its positions begin at 0.

Nothing of a block but attention and positions mixes tokens, so these two are exchanged, and all
else is computed for the shared row as a whole. Attention is called for each row of the data set
as a range of queries and keys: ranges of about one length are put side by side as the rows of one
call, padded at their ends, where a causal mask hides what was added. There is no mask between
tokens of different rows, because they never meet in a call. Where a block is computed for a tile
of tokens, the keys of a range begin where its row does.

Memory beside what attention takes: queries, keys and values once more, padded.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.masks import band_of, simplest_mask

# Ranges are padded to a multiple of this, so that few calls are made.
PAD_TO = 32
# On a GPU, which computes padding fast, to a power of two up to this, or else to a multiple of it,
# and their number is rounded up as well: a step is compiled for each set of shapes, and on CUDA
# cuDNN builds a kernel for each shape.
GPU_PAD_TO = 512

# (q [n, H, a, D], k [n, Hkv, b, D], v [n, Hkv, b, Dv], mask) -> [n, H, a, Dv]
Attend = Callable[[mx.array, mx.array, mx.array, mx.array | str | None], mx.array]
# The first token, and the one behind the last.
Between = tuple[int, int]
# Queries, keys, and the window under which they are attended to.
Use = tuple[Between, Between, int | None]


class UnknownUseError(Exception):
    """Attention is given tokens whose arrays are not among those that are bound."""


class Packing:
    """Where the rows of a batch begin.

    Args:
        starts: int [B, T], of each token the position at which its own row begins.

    Attributes:
        shape: B and T.
    """

    def __init__(self, starts: np.ndarray) -> None:
        self._starts, self.shape = starts, starts.shape
        # Of each token its position in its own row.
        self._at = mx.array((np.arange(starts.shape[1]) - starts).astype(np.int32))
        self._known: dict[Use, _Ranges] = {}
        self._bound: Sequence[Use] | None = None
        self._recording: list[dict[Use, None]] = []
        self._between: tuple[Between, Between] | None = None

    def first(self, start: int, stop: int) -> int:
        """The first token that any of these see."""
        return int(self._starts[:, start:stop].min())

    @contextmanager
    def between(self, queries: Between, keys: Between) -> Iterator[None]:
        """Let `attention` know which tokens it is given; by default all."""
        before, self._between = self._between, (queries, keys)
        try:
            yield
        finally:
            self._between = before

    def attention(
        self,
        attend: Attend,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array | str | None,
    ) -> mx.array:
        """Causal attention of every row to itself, [B, H, Tq, Dv], differentiable.

        Args:
            attend: attention of some ranges.
            queries: [B, H, Tq, D].
            keys, values: [B, Hkv, Tk, n].
            mask: of the whole call: "causal", or one that knows its window.

        Raises:
            ValueError: attention is given other tokens, or another mask.
        """
        band = band_of(mask)
        if band is None:
            raise ValueError("a block attends under a mask that is neither causal nor a window")
        rows, tokens = self._starts.shape
        own, seen = self._between or ((0, tokens), (0, tokens))
        expected = (rows, own[1] - own[0], rows, seen[1] - seen[0])
        if tuple(a.shape[i] for a in (queries, keys) for i in (0, 2)) != expected:
            raise ValueError(f"attention is given {queries.shape} and {keys.shape} of {expected}")
        ranges = self._of((own, seen, band.window))
        arrays = ranges.own.moved(queries), ranges.seen.moved(keys), ranges.seen.moved(values)
        found = [
            attend(*call, simplest_mask(range(k - q, k), k, band.window))
            for (q, k), *call in zip(ranges.shapes, *arrays, strict=True)
        ]
        return ranges.own.put_back(found)

    def _of(self, use: Use) -> "_Ranges":
        if self._bound is not None and use not in self._bound:
            raise UnknownUseError
        for uses in self._recording:
            uses[use] = None
        if use not in self._known:
            self._known[use] = _ranges(self._starts, *use)
        return self._known[use]

    @contextmanager
    def recording(self) -> Iterator[dict[Use, None]]:
        """Yield what `attention` is given inside, in the order of its first calls."""
        self._recording.append({})
        try:
            yield self._recording[-1]
        finally:
            self._recording.pop()

    def form(self, uses: Sequence[Use]) -> Hashable:
        """Equal for batches that do the same with their `arrays`."""
        return tuple((use, *self._of(use).form) for use in uses)

    def arrays(self, uses: Sequence[Use]) -> list[mx.array]:
        """All arrays by which batches of one form differ."""
        indices = chain.from_iterable(self._of(use).indices for use in uses)
        return [self._at, *(array for index in indices for array in index.arrays)]

    @contextmanager
    def bound(self, uses: Sequence[Use], arrays: Sequence[mx.array]) -> Iterator[None]:
        """Let `arrays` be in place of its own, in the same order.

        Raises:
            UnknownUseError: inside, attention is given something else than `uses`.
        """
        own = self.arrays(uses)
        self._bind(uses, iter(arrays))
        self._bound = uses
        try:
            yield
        finally:
            self._bound = None
            self._bind(uses, iter(own))

    def _bind(self, uses: Sequence[Use], arrays: Iterator[mx.array]) -> None:
        self._at = next(arrays)
        for index in chain.from_iterable(self._of(use).indices for use in uses):
            index.arrays = [next(arrays) for _ in index.arrays]

    def positions_from(self, offset: int, tokens: int) -> mx.array:
        """int32 [B, tokens], of the tokens from `offset` on."""
        return self._at[:, offset : offset + tokens]


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


class _Ranges(NamedTuple):
    """What attention is called for.

    Attributes:
        shapes: of each call the queries and the keys of a range, padding included.
        own: which queries it takes.
        seen: which keys.
    """

    shapes: list[tuple[int, int]]
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


def _ranges(starts: np.ndarray, queries: Between, keys: Between, window: int | None) -> _Ranges:
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
    return _Ranges(list(found), _Places(own, rows, count), _Places(seen, rows, width))


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


# Of the passes that go on, the innermost last.
_active: list[Packing | None] = []


def packing_now() -> Packing | None:
    """How rows share rows in what is computed now; None where they do not."""
    return _active[-1] if _active else None


@contextmanager
def rows_packed(packing: Packing | None) -> Iterator[None]:
    """Let blocks compute rows that share rows, or not; undone on exit, on error too.

    For one thread: every model of the process sees it.
    """
    original = mx.fast.rope
    _active.append(packing)
    if packing is not None:
        mx.fast.rope = _restarting(original)
    try:
        yield
    finally:
        mx.fast.rope = original
        _active.pop()


def _restarting(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`mx.fast.rope` with positions that begin where each row does."""

    def rope(x: mx.array, dims: int, *, offset: int | mx.array, **options: object) -> mx.array:
        packing = packing_now()
        # An array is of tokens that were taken out of their rows, behind attention: what is made
        # of it is not used (`BlockParts.output_at`).
        if packing is None or isinstance(offset, mx.array):
            return original(x, dims, offset=offset, **options)
        positions = packing.positions_from(offset, x.shape[-2])
        if x.ndim != 4 or positions.shape != (x.shape[0], x.shape[2]):
            raise ValueError(f"positions are asked for {x.shape} of {packing.shape}")
        # Every token as a row, because each row has an offset of its own.
        by_token = x.swapaxes(1, 2)
        single = by_token.reshape(-1, x.shape[1], 1, x.shape[3])
        turned = original(single, dims, offset=positions.reshape(-1), **options)
        return turned.reshape(by_token.shape).swapaxes(1, 2)

    return rope
