"""A block's call, a part of its tokens at a time, by its own code.

Around attention a block of a transformer works token by token. So its code is run for a few
tokens up to the call of attention, which is taken away from it (`before`), and run again
with the answer put in its place (`after`); what is not needed of either run is never
computed. A cache that holds nothing but a position tells it where the tokens stand.

A block whose attention is not all in that call (a floating mask made of its own input, as of
multi-head latent attention; attention of its own) is cut at its cache instead: what it gives
the cache for each token, be it keys and values or latents, is all that other tokens see of it
(`cached`). With all of that in the cache the block's own code computes the rest (`finished`).
No architecture is named: whether all this is true of a block is tried (`model/tiling.py`).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_edgelora.model.attention import Attention, attention_replaced
from mlx_edgelora.model.masks import band_of, banded, causal_array


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of every row of the batch."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Picked:
    """Some tokens of one row of the batch, each called as a batch of one.

    Attributes:
        row: of the batch.
        positions: int [m], ascending.
    """

    row: int
    positions: np.ndarray


Place = Span | Picked


class Asked(NamedTuple):
    """What a block asks of attention: q [B, H, t, D], k and v [B, Hkv, t, D], if they are kept."""

    q: mx.array
    k: mx.array | None
    v: mx.array | None
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None


class _Reached(Exception):
    """Carries what a block asks of attention out of it."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked


class _Position:
    """Stands for a cache: it knows where the tokens are, and keeps nothing."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


class _Captured(Exception):
    """Carries what a block gives its cache out of it."""


class EmptyCache:
    """Stands for an empty cache; what it is given ends the call."""

    def __init__(self, offset: int | mx.array = 0) -> None:
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
        """End the call."""
        raise _Captured(keys, values)


class FullCache:
    """Stands for a cache that holds all keys and values: what it is given is in there already.

    Attributes:
        calls: how often it was asked.
    """

    def __init__(self, offset: int | mx.array, keys: mx.array, values: mx.array) -> None:
        self.offset, self._held, self.calls = offset, (keys, values), 0

    def update_and_fetch(self, *_: mx.array) -> tuple[mx.array, mx.array]:
        """Give all keys and values."""
        self.calls += 1
        return self._held


def given_to_cache(
    call: Callable[[EmptyCache], object], offset: int | mx.array = 0
) -> list[mx.array]:
    """What a block gives its cache, twice [B, heads, t, n]: keys and values, or latents.

    Args:
        call: calls the block with a cache.
        offset: the first token's position.

    Raises:
        RuntimeError: it gives it nothing.
    """
    try:
        call(EmptyCache(offset))
    except _Captured as captured:
        return list(captured.args)
    raise RuntimeError("its cache is not asked for keys and values")


class BlockParts:
    """One call of a block, to be made for parts of its tokens.

    Args:
        block: its weights are bound whenever it is called.
        args, kwargs: what the model calls it with beside its input.
        branches: the names of its two children, attention and MLP, if each is added to the
            residual stream in turn: h = x + f(attention(g(x))), then h + f'(mlp(g'(h))). Then
            the block can be computed in halves (`middle`, `rest`).
        through_cache: cut the block at its cache, not at attention.
    """

    def __init__(
        self,
        block: nn.Module,
        args: tuple,
        kwargs: dict,
        branches: tuple[str, str] | None = None,
        through_cache: bool = False,
    ) -> None:
        self.block, self.branches, self.through_cache = block, branches, through_cache
        self._signature = inspect.signature(block.__call__)
        self._args, self._kwargs = args, kwargs

    def before(self, x: mx.array, place: Place) -> Asked:
        """What the tokens at `place` ask of attention.

        Args:
            x: [B, t, D] of a span; [m, 1, D] of picked tokens.
            place: where they are.

        Returns:
            Of picked tokens the queries are [1, H, m, D], keys and values of no use.

        Raises:
            RuntimeError: the block does not call mlx-lm's attention.
        """

        def capture(original: Attention, *args: Any, **kwargs: Any) -> None:
            asked = _asked(*args, **kwargs)
            if isinstance(place, Picked):
                asked = asked._replace(q=asked.q.transpose(2, 1, 0, 3))
            raise _Reached(asked)

        try:
            with attention_replaced(capture):
                self._call(x, place, _Position(_offset(place)))
        except _Reached as reached:
            return reached.asked
        raise RuntimeError("it does not call mlx-lm's attention")

    def after(self, x: mx.array, place: Place, attended: mx.array) -> mx.array:
        """What the block returns for the tokens at `place`.

        Args:
            x, place: as of `before`.
            attended: what attention gives for their queries, in the queries' shape.
        """
        if isinstance(place, Picked):
            attended = attended.transpose(2, 1, 0, 3)
        calls = []

        def answer(original: Attention, *args: Any, **kwargs: Any) -> mx.array:
            calls.append(1)
            return attended

        with attention_replaced(answer):
            out = self._call(x, place, _Position(_offset(place)))
        if len(calls) != 1:
            raise RuntimeError(f"it calls attention {len(calls)} times, expected once")
        return out

    def middle(self, x: mx.array, place: Place, attended: mx.array) -> mx.array:
        """The residual stream between the halves: as `after`, with nothing from the MLP."""
        with _silent(self.block, self.branches[1]):
            return self.after(x, place, attended)

    def rest(self, middle: mx.array, place: Place) -> mx.array:
        """What the block returns for tokens whose residual stream between the halves this is."""
        with _silent(self.block, self.branches[0]):
            return self._call(middle, place, _Position(_offset(place)))

    def kept(self, x: mx.array, span: Span) -> list[mx.array]:
        """What other tokens see of those of a span: keys and values, or what they give the cache.

        Returns:
            [B, heads, t, n] twice.

        Raises:
            RuntimeError: the block asks neither mlx-lm's attention nor, if it is cut there, its
                cache.
        """
        if self.through_cache:
            return self.cached(x, span, span.start)
        asked = self.before(x, span)
        return [asked.k, asked.v]

    def cached(self, x: mx.array, span: Span, offset: int | mx.array) -> list[mx.array]:
        """What the tokens of a span give a cache that says where the first of them is.

        Raises:
            RuntimeError: nothing.
        """
        return given_to_cache(lambda cache: self._call(x, span, cache), offset)

    def finished(self, x: mx.array, span: Span, keys: Span, cached: list[mx.array]) -> mx.array:
        """What the block returns for the tokens of a span, or the middle of a block in halves.

        Args:
            x: [B, t, D].
            span: where they are.
            keys: the tokens that they may see (`seen`).
            cached: what these gave the cache.

        Raises:
            RuntimeError: it does not ask its cache once.
        """
        cache = FullCache(span.start, *cached)
        with _silent(self.block, self.branches[1]) if self.branches else nullcontext():
            out = self._call(x, span, cache, self._mask_between(span, keys))
        if cache.calls != 1:
            raise RuntimeError(f"it asks its cache {cache.calls} times, expected once")
        return out

    def seen(self, span: Span, tokens: int) -> Span:
        """The tokens, of so many, that those of a span may see."""
        return keys_seen(self._mask(), span, tokens)

    def _mask(self) -> mx.array | str | None:
        return self.bind(None).arguments.get("mask")

    def _mask_between(self, span: Span, keys: Span) -> mx.array | str | None:
        mask = self._mask()
        part = mask_at(mask, span, keys)[1]
        if not isinstance(mask, mx.array) or isinstance(part, mx.array):
            return part
        return causal_array(
            range(span.start - keys.start, span.stop - keys.start), keys.stop - keys.start
        )

    def bind(self, x: mx.array) -> inspect.BoundArguments:
        """The arguments of the whole call, for input x."""
        return self._signature.bind(x, *self._args, **self._kwargs)

    def with_mask(self, mask: mx.array | str | None) -> "BlockParts":
        """The same call under another mask."""
        arguments = dict(list(self.bind(None).arguments.items())[1:])
        rest = arguments | {"mask": mask}
        return BlockParts(self.block, (), rest, self.branches, self.through_cache)

    def cut(self, branches: tuple[str, str] | None, through_cache: bool) -> "BlockParts":
        """The same call, in halves or not, cut at its cache or at attention."""
        return BlockParts(self.block, self._args, self._kwargs, branches, through_cache)

    def whole(self, x: mx.array) -> mx.array:
        """What the block returns for all tokens."""
        return self.block(x, *self._args, **self._kwargs)

    def _call(
        self, x: mx.array, place: Place, cache: object, mask: mx.array | str | None = None
    ) -> mx.array:
        """Call the block for some tokens; with another mask if there is one."""
        call, offset = self.bind(x), _offset(place)
        for name, value in list(call.arguments.items())[1:]:
            # Something said about each token, such as a scale of its queries.
            if name != "mask" and isinstance(value, mx.array):
                call.arguments[name] = (
                    value[place.start : place.stop]
                    if isinstance(place, Span)
                    else value[offset][:, None, None]
                )
        call.arguments["cache"] = cache
        if mask is not None:
            call.arguments["mask"] = mask
        return self.block(*call.args, **call.kwargs)


def _offset(place: Place) -> int | mx.array:
    """The position of the first token, or of each picked one."""
    return place.start if isinstance(place, Span) else mx.array(place.positions)


def _asked(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> Asked:
    return Asked(queries, keys, values, scale, mask, sinks)


@contextmanager
def _silent(block: nn.Module, name: str) -> Iterator[None]:
    """Let a child of the block answer with zeros; undone on exit."""
    child = block[name]
    block[name] = lambda x, *args, **kwargs: mx.zeros_like(x)
    try:
        yield
    finally:
        block[name] = child


def tokens_at(x: mx.array, start: int, place: Place) -> mx.array:
    """The tokens at a place, of a tile [B, t, D] that begins at token `start`: for `before`."""
    if isinstance(place, Span):
        return x[:, place.start - start : place.stop - start]
    return x[place.row, mx.array(place.positions - start)][:, None]


def keys_seen(mask: mx.array | str | None, place: Place, tokens: int) -> Span:
    """The keys, of so many tokens, among which are all that tokens at a place see."""
    band = band_of(mask)
    if band is None:
        return Span(0, tokens)
    first, last = _ends(place)
    return Span(0 if band.window is None else max(0, first - band.window + 1), last + 1)


def mask_at(
    mask: mx.array | str | None, place: Place, keys: Span
) -> tuple[bool, mx.array | str | None]:
    """Whether tokens at a place see any of some keys, and the mask between them.

    Args:
        mask: of the whole call; "causal", an array [..., T, T], or None.
        place: of the queries.
        keys: a span of them.

    Raises:
        ValueError: the mask is another word.
    """
    if mask is None:
        return True, None
    band = band_of(mask)
    if band is None and isinstance(mask, str):
        raise ValueError(f"the mask {mask!r} is none that attention knows")
    if band is None:
        return True, _array_at(mask, place, keys)
    first, last = _ends(place)
    if keys.start > last or (band.window is not None and keys.stop <= first - band.window + 1):
        return False, None
    if isinstance(place, Span):
        positions = range(place.start - keys.start, place.stop - keys.start)
    else:
        positions = place.positions - keys.start
    return True, banded(positions, keys.stop - keys.start, band.window)


def _array_at(mask: mx.array, place: Place, keys: Span) -> mx.array:
    if isinstance(place, Picked) and mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[place.row : place.row + 1]
    # An axis of one is the same for all; MLX does not see an index beyond it.
    if mask.ndim > 1 and mask.shape[-2] > 1:
        span = isinstance(place, Span)
        mask = mask[..., slice(place.start, place.stop) if span else mx.array(place.positions), :]
    return mask[..., keys.start : keys.stop] if mask.shape[-1] > 1 else mask


def _ends(place: Place) -> tuple[int, int]:
    """The first and the last token at a place."""
    if isinstance(place, Span):
        return place.start, place.stop - 1
    return int(place.positions[0]), int(place.positions[-1])
