"""A block's call, a part of its tokens at a time, by its own code.

Of other tokens a token sees nothing but their keys and values. Where a block calls mlx-lm's
attention, they are what it gives that function, which is taken away from it for the time of a
call (`key_values`); with those of all tokens in hand its own code computes the rest (`output`).

A block whose attention is not all in that call (a floating mask made of its own input, as of
multi-head latent attention; attention of its own) is cut at its cache instead: what it gives
the cache for each token, be it keys and values or latents, is all that other tokens see of it,
and with all of that in the cache its own code computes the rest.

For some tokens alone (`output_rows`) attention is computed for all, and what lies behind it for
these: products with most of a block's weights.
No architecture is named: whether all this is true of a block is tried (`blocks/tiling.py`).
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.attention import Attention, replace_attention
from mlx_edgelora.blocks.masks import band_of, causal_array, simplest_mask
from mlx_edgelora.blocks.packing import packing_now


@dataclass(frozen=True)
class TokenSpan:
    """Tokens `start` to `stop` of every row of the batch."""

    start: int
    stop: int


class AttentionInputs(NamedTuple):
    """What a block asks of attention: q [B, H, t, D], k and v [B, Hkv, t, D]."""

    q: mx.array
    k: mx.array
    v: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None


class _AttentionReached(Exception):
    """Carries what a block asks of attention out of it."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs


class _Position:
    """Stands for a cache: it knows where the tokens are, and keeps nothing."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


class _CacheReached(Exception):
    """Carries what a block gives its cache out of it."""


class _EmptyCache:
    """Stands for an empty cache; what it is given ends the call."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
        raise _CacheReached(keys, values)


class _FullCache:
    """Stands for a cache that holds all keys and values: what it is given is in there already."""

    def __init__(self, offset: int, keys: mx.array, values: mx.array) -> None:
        self.offset, self._held, self.calls = offset, (keys, values), 0

    def update_and_fetch(self, *_: mx.array) -> tuple[mx.array, mx.array]:
        self.calls += 1
        return self._held


class BlockParts:
    """One call of a block, to be made for parts of its tokens.

    Args:
        block: its weights are bound whenever it is called.
        args, kwargs: what the model calls it with beside its input.
        through_cache: cut the block at its cache, not at attention.
    """

    def __init__(
        self, block: nn.Module, args: tuple, kwargs: dict, through_cache: bool = False
    ) -> None:
        self.block, self.through_cache = block, through_cache
        self._args, self._kwargs = args, kwargs

    def attention_inputs(
        self, x: mx.array, span: TokenSpan, offset: int | mx.array | None = None
    ) -> AttentionInputs:
        """What the tokens of a span, [B, t, D], ask of attention.

        Args:
            offset: the first token's position, the span's own by default.

        Raises:
            RuntimeError: the block does not call mlx-lm's attention.
        """

        def capture(original: Attention, *args: Any, **kwargs: Any) -> None:
            raise _AttentionReached(_attention_inputs(*args, **kwargs))

        cache = _Position(span.start if offset is None else offset)
        try:
            with replace_attention(capture):
                self._call(x, cache, slice(span.start, span.stop))
        except _AttentionReached as reached:
            return reached.inputs
        raise RuntimeError("it does not call mlx-lm's attention")

    def key_values(
        self, x: mx.array, span: TokenSpan, offset: int | mx.array | None = None
    ) -> list[mx.array]:
        """What other tokens see of those of a span: keys and values, or what they give the cache.

        Args:
            x: [B, t, D].
            span: where they are.
            offset: as of `attention_inputs`.

        Returns:
            [B, heads, t, n] twice.

        Raises:
            RuntimeError: the block asks neither mlx-lm's attention nor, if it is cut there, its
                cache.
        """
        if not self.through_cache:
            inputs = self.attention_inputs(x, span, offset)
            return [inputs.k, inputs.v]
        try:
            cache = _EmptyCache(span.start if offset is None else offset)
            self._call(x, cache, slice(span.start, span.stop))
        except _CacheReached as captured:
            return list(captured.args)
        raise RuntimeError("its cache is not asked for keys and values")

    def output(
        self, x: mx.array, span: TokenSpan, keys: TokenSpan, key_values: list[mx.array]
    ) -> mx.array:
        """What the block returns for the tokens of a span.

        Args:
            x: [B, t, D].
            span: where they are.
            keys: the tokens that they may see (`seen`).
            key_values: what is `key_values` of these.

        Raises:
            RuntimeError: it does not ask attention, or its cache, once.
        """
        tokens = slice(span.start, span.stop)
        if self.through_cache:
            cache = _FullCache(span.start, *key_values)
            out = self._call(x, cache, tokens, self._mask_between(span, keys))
            _check_calls(cache.calls, "its cache")
            return out
        attended = []

        def attend(original: Attention, *args: Any, **kwargs: Any) -> mx.array:
            attended.append(
                _attend(original, _attention_inputs(*args, **kwargs), span, keys, key_values)
            )
            return attended[-1]

        with replace_attention(attend):
            out = self._call(x, _Position(span.start), tokens)
        _check_calls(len(attended), "attention")
        return out

    def output_at(
        self,
        x: mx.array,
        span: TokenSpan,
        keys: TokenSpan,
        key_values: list[mx.array],
        rows: mx.array,
    ) -> mx.array:
        """As `output`, for some of the span's tokens; not of a block that is cut at its cache.

        Args:
            rows: int [n], of the B * t tokens.

        Returns:
            [1, n, D].
        """
        inputs, attended = self.attention_inputs(x, span), []

        def attend(original: Attention, *_: Any, **__: Any) -> mx.array:
            if not attended:
                whole = _attend(original, inputs, span, keys, key_values)  # [B, H, t, D]
                flat = whole.swapaxes(1, 2).reshape(-1, whole.shape[1], 1, whole.shape[3])
                attended.append(flat[rows])
            else:
                attended.append(attended[0])
            return attended[0]

        single = x.reshape(-1, 1, x.shape[-1])[rows]
        positions = span.start + rows % x.shape[1]
        with replace_attention(attend):
            out = self._call(single, _Position(positions), positions)
        _check_calls(len(attended), "attention")
        return out.swapaxes(0, 1)

    def output_rows(self, x: mx.array, rows: mx.array) -> mx.array:
        """What the block returns for some of all tokens.

        Args:
            x: [B, T, D].
            rows: int [n], of the B * T tokens.

        Returns:
            [1, n, D].
        """
        every = TokenSpan(0, x.shape[1])
        inputs = self.attention_inputs(x, every)
        return self.output_at(x, every, every, [inputs.k, inputs.v], rows)

    def visible_keys(self, span: TokenSpan, tokens: int) -> TokenSpan:
        """The tokens, of so many, that those of a span may see."""
        seen = visible_keys(self.mask, span, tokens)
        if (packing := packing_now()) is None:
            return seen
        return TokenSpan(max(seen.start, packing.first(span.start, span.stop)), seen.stop)

    @cached_property
    def mask(self) -> mx.array | str | None:
        """The mask of the call."""
        return self.bind(None).arguments.get("mask")

    def _mask_between(self, span: TokenSpan, keys: TokenSpan) -> mx.array | str | None:
        part = mask_at(self.mask, span, keys)
        if not isinstance(self.mask, mx.array) or isinstance(part, mx.array):
            return part
        return causal_array(
            range(span.start - keys.start, span.stop - keys.start), keys.stop - keys.start
        )

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.block.__call__)

    def bind(self, x: mx.array | None) -> inspect.BoundArguments:
        """The arguments of the whole call, for input x."""
        return self._signature.bind(x, *self._args, **self._kwargs)

    def untileable_reason(self, tokens: int) -> str | None:
        """Why arguments beside input and mask cannot be cut into so many tokens, if so."""
        call = self.bind(None)
        for name, value in list(call.arguments.items())[1:]:
            kind = call.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD and value:
                return f"a block takes {', '.join(value)} by no name of its own"
            if name == "mask":
                continue
            if isinstance(value, mx.array):
                if value.ndim != 2 or value.shape[0] != tokens:
                    return f"{name} of a block is {value.shape}, not a row for each token"
            elif any(isinstance(leaf, mx.array) for _, leaf in tree_flatten(value)):
                return f"{name} of a block holds arrays"
        return None

    def with_mask(self, mask: mx.array | str | None) -> "BlockParts":
        """The same call under another mask."""
        arguments = dict(list(self.bind(None).arguments.items())[1:])
        return BlockParts(self.block, (), arguments | {"mask": mask}, self.through_cache)

    def whole(self, x: mx.array) -> mx.array:
        """What the block returns for all tokens."""
        return self.block(x, *self._args, **self._kwargs)

    def _call(
        self,
        x: mx.array,
        cache: object,
        tokens: slice | mx.array,
        mask: mx.array | str | None = None,
    ) -> mx.array:
        """Call the block for some tokens, [B, t, D] or, if they are an array, [n, 1, D]."""
        call = self.bind(x)
        for name, value in list(call.arguments.items())[1:]:
            # Something said about each token, such as a scale of its queries.
            if name != "mask" and isinstance(value, mx.array):
                of_each = value[tokens]
                call.arguments[name] = (
                    of_each if isinstance(tokens, slice) else of_each[:, None, None]
                )
        call.arguments["cache"] = cache
        if mask is not None:
            call.arguments["mask"] = mask
        return self.block(*call.args, **call.kwargs)


def _attend(
    original: Attention,
    inputs: AttentionInputs,
    span: TokenSpan,
    keys: TokenSpan,
    key_values: list[mx.array],
) -> mx.array:
    """Attention of a span's queries over what is kept of the keys they may see."""
    options = {"cache": None, "scale": inputs.scale, "sinks": inputs.sinks}
    if (packing := packing_now()) is not None:
        with packing.between((span.start, span.stop), (keys.start, keys.stop)):
            return original(inputs.q, *key_values, mask=inputs.mask, **options)
    return original(inputs.q, *key_values, mask=mask_at(inputs.mask, span, keys), **options)


def _check_calls(count: int, what: str) -> None:
    if count != 1:
        raise RuntimeError(f"it asks {what} {count} times, expected once")


def _attention_inputs(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> AttentionInputs:
    return AttentionInputs(queries, keys, values, scale, mask, sinks)


def visible_keys(mask: mx.array | str | None, span: TokenSpan, tokens: int) -> TokenSpan:
    """The keys, of so many tokens, among which are all that the tokens of a span see."""
    band = band_of(mask)
    if band is None:
        return TokenSpan(0, tokens)
    window = band.window
    return TokenSpan(0 if window is None else max(0, span.start - window + 1), span.stop)


def mask_at(mask: mx.array | str | None, span: TokenSpan, keys: TokenSpan) -> mx.array | str | None:
    """The mask between the tokens of a span and some keys.

    Args:
        mask: of the whole call; "causal", an array [..., T, T], or None.
        span: of the queries.
        keys: of the keys; each query sees one of them.

    Raises:
        ValueError: the mask is another word.
    """
    if mask is None:
        return None
    band = band_of(mask)
    if band is not None:
        positions = range(span.start - keys.start, span.stop - keys.start)
        return simplest_mask(positions, keys.stop - keys.start, band.window)
    if isinstance(mask, str):
        raise ValueError(f"the mask {mask!r} is none that attention knows")
    # An axis of one is the same for all; MLX does not see an index beyond it.
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., span.start : span.stop, :]
    return mask[..., keys.start : keys.stop] if mask.shape[-1] > 1 else mask
