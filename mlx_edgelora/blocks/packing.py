"""Rows that share a row of a batch: each attends to itself alone, and its positions begin at 0.

Nothing of a block but attention and positions mixes tokens, so these two are exchanged, and all
else is computed for the shared row as a whole. `packed_attention.py` has attention. Where a block
is computed for a tile of tokens, the keys of a row begin where it does.

Memory beside what attention takes: queries, keys and values once more, padded.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.masks import band_of
from mlx_edgelora.blocks.packed_attention import (
    Attend,
    Between,
    Pieces,
    Ranges,
    Use,
    pieces,
    ranges,
)


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
        self._known: dict[Use, Ranges | Pieces] = {}
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
        found = self._of((own, seen, band.window))
        return found.attention(attend, queries, keys, values, self._at)

    def _of(self, use: Use) -> Ranges | Pieces:
        if self._bound is not None and use not in self._bound:
            raise UnknownUseError
        for uses in self._recording:
            uses[use] = None
        if use not in self._known:
            few = pieces(self._starts, *use) if mx.cuda.is_available() else None
            self._known[use] = few or ranges(self._starts, *use)
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
        # MLX 0.32.4 asks CUDA for 1,024 threads at once, which has 64 for the rows: entries and
        # tokens of a row must take 16.
        copies = max(1, 32 // dims) if mx.cuda.is_available() else 1
        several = mx.repeat(single, copies, axis=2) if copies > 1 else single
        turned = original(several, dims, offset=positions.reshape(-1), **options)[:, :, :1]
        return turned.reshape(by_token.shape).swapaxes(1, 2)

    return rope
