"""Compute a block for a part of its tokens by its caches, as mlx-lm generates text by chunks.

Some blocks attend more than once, or choose what to attend to by keys of their own, as sparse
attention does: such a block has several caches. Other tokens depend on a token only through the
arrays that it appends to them, so a tile is a function

    y, own arrays = block(x, arrays of the tokens before)

and its gradient goes through both. No architecture is named; `blocks/cached_trial.py` tries whether
it holds for a block.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlx_edgelora.blocks.attention import replace_attention
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan, without_cache

# The place of a cache in nested lists of caches.
Path = tuple[int, ...]


class _Filled(Exception):
    """Ends a block's call once all its caches have the arrays of its tokens."""


class _Caches:
    """Takes the place of a block's caches, however they are nested, in one call.

    Args:
        offset: position of the first token.
        before: for each cache in the order of its use, the arrays of the tokens before; none for
            the first tile.
        count: number of caches after which the call is ended; None for a whole call.
    """

    def __init__(
        self, offset: int | mx.array, before: Sequence[mx.array] = (), count: int | None = None
    ) -> None:
        self.offset, self.own = offset, []
        self._before, self._count, self._inner = before, count, {}
        self._used: set[Path] = set()

    def __getitem__(self, index: int) -> "_Inner":
        return self._at((index,))

    def _at(self, path: Path) -> "_Inner":
        return self._inner.setdefault(path, _Inner(self, path))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append to the only cache, or to the one at a path."""
        return self.append((), keys, values)

    def append(self, path: Path, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The arrays of the tokens so far, of the cache at a path."""
        if path in self._used:
            raise RuntimeError("a cache of it is filled twice")
        self._used.add(path)
        place = len(self.own)
        self.own += [keys, values]
        if len(self.own) == self._count:
            raise _Filled
        if not self._before:
            return keys, values
        pairs = zip(self._before[place : place + 2], (keys, values), strict=True)
        return tuple(mx.concatenate(pair, axis=2) for pair in pairs)


class _Inner:
    """One of several caches."""

    def __init__(self, caches: _Caches, path: Path) -> None:
        self._caches, self._path = caches, path
        self.offset = caches.offset
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def __getitem__(self, index: int) -> "_Inner":
        return self._caches._at((*self._path, index))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = self._caches.append(self._path, keys, values)
        return self.keys, self.values


class CachedParts(BlockParts):
    """One call of a block, to be made for tiles of tokens, first to last.

    Args:
        block, args, kwargs: as for `BlockParts`.
    """

    def __init__(self, block: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        super().__init__(block, args, kwargs)

    def tile(
        self, x: mx.array, span: TokenSpan, before: Sequence[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """The block's output for the tokens of a span, and what they append to its caches.

        Args:
            x: input [B, t, D].
            span: position of the tokens.
            before: what the tokens before appended, [B, heads, start, n] each; none for the first.

        Returns:
            The output [B, t, D], and arrays [B, heads, t, n].
        """
        caches = _Caches(span.start, before)
        out = self._called(x, caches, span)
        return out, caches.own

    def appended(
        self, x: mx.array, span: TokenSpan, before: Sequence[mx.array], count: int
    ) -> list[mx.array]:
        """What the tokens of a span append to the caches, `count` arrays; see `tile`."""
        return self._until_filled(x, span, _Caches(span.start, before, count))

    def placed(self, x: mx.array, span: TokenSpan, offset: mx.array, count: int) -> list[mx.array]:
        """As `appended` for the first tile, of tokens at another position."""
        return self._until_filled(x, span, _Caches(offset, (), count))

    def _with_call(self, args: tuple, kwargs: dict) -> "CachedParts":
        return CachedParts(self.block, args, kwargs)

    def _until_filled(self, x: mx.array, span: TokenSpan, caches: _Caches) -> list[mx.array]:
        with suppress(_Filled):
            self._called(x, caches, span)
        return caches.own

    def _called(self, x: mx.array, caches: _Caches, span: TokenSpan) -> mx.array:
        mask = self._mask_between(span, TokenSpan(0, span.stop))
        with replace_attention(without_cache):
            return self._call(x, caches, slice(span.start, span.stop), mask)
