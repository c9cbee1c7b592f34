"""Compute a block for a part of its tokens, with its own code.

A token depends on other tokens only through their keys and values. A block that calls mlx-lm's
attention passes them to that function, which is replaced during a call (`key_values`). Given the
keys and values of all tokens, the block's own code computes the output (`output`).

Some blocks do more in attention than that call shows: multi-head latent attention makes a floating
mask from its input, and some architectures have attention of their own. Such a block is cut at its
cache instead. Other tokens depend on a token only through the arrays that it passes to the cache
(keys and values, or latents), so with a filled cache the block's own code computes the output.

For some tokens only (`output_rows`), attention is computed for all tokens, and the layers after it,
with most of a block's weights, for these. No architecture is named: `blocks/tiling.py` tries
whether all this holds for a block.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_edgelora.blocks.attention import Attention, replace_attention
from mlx_edgelora.blocks.masks import band_of, causal_array, simplest_mask
from mlx_edgelora.blocks.outputs import (
    Linked,
    OutputForm,
    Position,
    leaves_of,
    links_of,
    map_leaves,
)
from mlx_edgelora.blocks.packing import packing_now


@dataclass(frozen=True)
class TokenSpan:
    """Tokens `start` to `stop` of every row of the batch."""

    start: int
    stop: int


class AttentionInputs(NamedTuple):
    """The arguments of a block's attention: q [B, H, t, D], k and v [B, Hkv, t, D]."""

    q: mx.array
    k: mx.array
    v: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None


class _AttentionReached(Exception):
    """Ends a block's call at its attention, and carries the arguments."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs


class TokenPosition:
    """Takes the place of a cache: it has an offset and keeps nothing."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return what it is given."""
        return keys, values


class _CacheReached(Exception):
    """Ends a block's call at its cache, and carries the arguments."""


class _EmptyCache:
    """Takes the place of an empty cache; its first update ends the call."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> None:
        raise _CacheReached(keys, values)


class _FullCache:
    """Takes the place of a cache that already holds the keys and values of all tokens."""

    def __init__(self, offset: int, keys: mx.array, values: mx.array) -> None:
        self.offset, self._held, self.calls = offset, (keys, values), 0

    def update_and_fetch(self, *_: mx.array) -> tuple[mx.array, mx.array]:
        self.calls += 1
        return self._held


@dataclass(frozen=True)
class _Picked:
    """Some tokens: rows of the batch and positions, int [n] each; the first position of a tile."""

    rows: mx.array
    positions: mx.array
    start: int


class BlockParts:
    """One call of a block, to be made for parts of its tokens.

    What the block reads of earlier ones is among its arguments: cut from the stand-ins there, or
    given as `shared`, in the order of `outputs.links_of`, each of the tokens of the part.

    Args:
        block: the block as a function (`BlockList.function`); its weights are bound when it is
            called.
        args, kwargs: its arguments after the input.
        through_cache: whether to cut the block at its cache instead of at attention.
        form: what it returns; None for its hidden state alone.
    """

    def __init__(
        self,
        block: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        through_cache: bool = False,
        form: OutputForm | None = None,
    ) -> None:
        self.block, self.through_cache, self.form = block, through_cache, form
        self._args, self._kwargs = args, kwargs

    def attention_inputs(
        self,
        x: mx.array,
        span: TokenSpan,
        offset: int | mx.array | None = None,
        shared: Sequence[mx.array] | None = None,
        cache: object = None,
    ) -> AttentionInputs:
        """The attention arguments for the tokens of a span, [B, t, D].

        Args:
            offset: position of the first token, by default that of the span.
            shared: what the block reads of earlier ones.
            cache: takes the place of the block's cache; by default it has a position only.

        Raises:
            RuntimeError: the block does not call mlx-lm's attention.
        """

        def capture(original: Attention, *args: Any, **kwargs: Any) -> None:
            raise _AttentionReached(_attention_inputs(*args, **kwargs))

        if cache is None:
            cache = TokenPosition(span.start if offset is None else offset)
        try:
            with replace_attention(capture):
                self._call(x, cache, slice(span.start, span.stop), shared=shared)
        except _AttentionReached as reached:
            return reached.inputs
        raise RuntimeError("it does not call mlx-lm's attention")

    def key_values(
        self,
        x: mx.array,
        span: TokenSpan,
        offset: int | mx.array | None = None,
        shared: Sequence[mx.array] | None = None,
    ) -> list[mx.array]:
        """The keys and values of a span, or the arrays that its tokens pass to the cache.

        Args:
            x: input [B, t, D].
            span: position of the tokens.
            offset, shared: as in `attention_inputs`.

        Returns:
            Two arrays [B, heads, t, n].

        Raises:
            RuntimeError: the block does not call mlx-lm's attention or, if it is cut there, its
                cache.
        """
        if not self.through_cache:
            inputs = self.attention_inputs(x, span, offset, shared)
            return [inputs.k, inputs.v]
        try:
            cache = _EmptyCache(span.start if offset is None else offset)
            self._call(x, cache, slice(span.start, span.stop), shared=shared)
        except _CacheReached as captured:
            return list(captured.args)
        raise RuntimeError("its cache is not asked for keys and values")

    def output(
        self, x: mx.array, span: TokenSpan, keys: TokenSpan, key_values: list[mx.array]
    ) -> mx.array:
        """The hidden state of `outputs`, [B, t, D]."""
        return self.outputs(x, span, keys, key_values)[0]

    def outputs(
        self,
        x: mx.array,
        span: TokenSpan,
        keys: TokenSpan,
        key_values: list[mx.array],
        shared: Sequence[mx.array] | None = None,
        cache: object = None,
    ) -> list[mx.array]:
        """The block's output for the tokens of a span, and what later blocks read of it.

        Args:
            x: input [B, t, D].
            span: position of the tokens.
            keys: span of the tokens that they may see (`visible_keys`).
            key_values: `key_values` of these tokens.
            shared: what the block reads of earlier ones.
            cache: as in `attention_inputs`, where the block is cut at attention.

        Raises:
            RuntimeError: the block does not call attention, or its cache, exactly once.
        """
        tokens = slice(span.start, span.stop)
        if self.through_cache:
            cache = _FullCache(span.start, *key_values)
            with replace_attention(without_cache):
                out = self._call(x, cache, tokens, self._mask_between(span, keys), shared)
            _check_calls(cache.calls, "its cache")
            return self._outputs(out)
        attended = []

        def attend(original: Attention, *args: Any, **kwargs: Any) -> mx.array:
            attended.append(
                _attend(original, _attention_inputs(*args, **kwargs), span, keys, key_values)
            )
            return attended[-1]

        with replace_attention(attend):
            own = TokenPosition(span.start) if cache is None else cache
            out = self._call(x, own, tokens, shared=shared)
        _check_calls(len(attended), "attention")
        return self._outputs(out)

    def output_at(
        self,
        x: mx.array,
        span: TokenSpan,
        keys: TokenSpan,
        key_values: list[mx.array],
        rows: mx.array,
        shared: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """As `output`, for some of the span's tokens; not for a block that is cut at its cache.

        Args:
            rows: int [n], indices among the B * t tokens.
            shared: what the block reads of earlier ones.

        Returns:
            [1, n, D].
        """
        inputs, attended = self.attention_inputs(x, span, shared=shared), []

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
            picked = _Picked(rows // x.shape[1], positions, span.start)
            out = self._call(single, TokenPosition(positions), picked, shared=shared)
        _check_calls(len(attended), "attention")
        return self._outputs(out)[0].swapaxes(0, 1)

    def output_rows(self, x: mx.array, rows: mx.array) -> mx.array:
        """The block's output for some of all tokens.

        Args:
            x: input [B, T, D].
            rows: int [n], indices among the B * T tokens.

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
    def mask_name(self) -> str:
        """Name of the argument that masks attention, of which there may be none."""
        given = self.bind(None).arguments.items()
        named = [name for name, value in given if name.endswith("mask") and value is not None]
        return named[0] if len(named) == 1 else "mask"

    @cached_property
    def mask(self) -> mx.array | str | None:
        """The mask of the call."""
        return self.bind(None).arguments.get(self.mask_name)

    def _mask_between(self, span: TokenSpan, keys: TokenSpan) -> mx.array | str | None:
        part = mask_at(self.mask, span, keys)
        if not isinstance(self.mask, mx.array) or isinstance(part, mx.array):
            return part
        return causal_array(
            range(span.start - keys.start, span.stop - keys.start), keys.stop - keys.start
        )

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.block)

    def bind(self, x: mx.array | None) -> inspect.BoundArguments:
        """Bind the arguments of the whole call for input x."""
        return self._signature.bind(x, *self._args, **self._kwargs)

    def untileable_reason(self, tokens: int) -> str | None:
        """Why the other arguments cannot be cut into tiles of tokens; None if they can."""
        call = self.bind(None)
        for name, value in list(call.arguments.items())[1:]:
            kind = call.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD and value:
                return f"a block takes {', '.join(value)} by no name of its own"
            if name == self.mask_name:
                continue
            arrays = [leaf for _, leaf in leaves_of(value) if isinstance(leaf, mx.array)]
            if all(isinstance(leaf, Linked) for leaf in arrays):
                continue
            if not isinstance(value, mx.array):
                return f"{name} of a block holds arrays"
            axis = 0 if value.ndim == 2 else 1
            if value.ndim < 2 or value.shape[axis] != tokens:
                return f"{name} of a block is {value.shape}, not a row for each token"
        return None

    @property
    def is_causal(self) -> bool:
        """Whether the mask shows that no token sees a later one."""
        return band_of(self.mask) is not None

    def with_mask(self, mask: mx.array | str | None) -> "BlockParts":
        """The same call with another mask."""
        arguments = dict(list(self.bind(None).arguments.items())[1:])
        if self.mask_name in self._signature.parameters:
            arguments[self.mask_name] = mask
        return self._with_call((), arguments)

    def _with_call(self, args: tuple, kwargs: dict) -> "BlockParts":
        return BlockParts(self.block, args, kwargs, self.through_cache, self.form)

    def whole(self, x: mx.array) -> list[mx.array]:
        """The block's output for all tokens, and what later blocks read of it."""
        return self._outputs(self.block(x, *self._args, **self._kwargs))

    def _outputs(self, out: Any) -> list[mx.array]:
        return [out] if self.form is None else self.form.outputs(out)

    def _call(
        self,
        x: mx.array,
        cache: object,
        tokens: "slice | _Picked",
        mask: mx.array | str | None = None,
        shared: Sequence[mx.array] | None = None,
    ) -> Any:
        """Call the block for some tokens: a slice [B, t, D], or some of them [n, 1, D]."""
        call = self.bind(x)
        links = links_of(self._args, self._kwargs) if shared is not None else []
        given = dict(zip(links, shared or (), strict=True))

        def part(leaf: Any) -> Any:
            if isinstance(leaf, Position):
                return cache.offset
            if not isinstance(leaf, Linked):
                return leaf
            if leaf.link not in given:
                return _at_tokens(leaf, leaf.token_axis, tokens)
            array = given[leaf.link]
            if isinstance(tokens, slice):
                return array
            inside = _Picked(tokens.rows, tokens.positions - tokens.start, 0)
            return _at_tokens(array, leaf.token_axis, inside)

        for name, value in list(call.arguments.items())[1:]:
            if name == self.mask_name:
                continue
            # An array with a value for each token, such as a scale of its queries.
            if isinstance(value, mx.array) and not isinstance(value, Linked):
                call.arguments[name] = _at_tokens(value, 0 if value.ndim == 2 else 1, tokens)
            else:
                call.arguments[name] = map_leaves(part, value)
        if call.arguments.get("offset") is not None and isinstance(cache, TokenPosition):
            # Its model tells it where it is, not a cache.
            call.arguments["offset"] = cache.offset
        else:
            call.arguments["cache"] = cache
        if mask is not None:
            call.arguments[self.mask_name] = mask
        return self.block(*call.args, **call.kwargs)


def _at_tokens(array: mx.array, axis: int, tokens: "slice | _Picked") -> mx.array:
    """The part of an array with some tokens, whose axis is this.

    A slice of tokens stays on that axis; picked ones become rows of a batch, of one token each.
    """
    if isinstance(tokens, slice):
        return array[(*[slice(None)] * axis, tokens)]
    if axis == 0:  # the same for all rows of the batch
        return array[tokens.positions][:, None, None]
    found = mx.moveaxis(array, axis, 1)[tokens.rows % array.shape[0], tokens.positions]
    return mx.expand_dims(found, axis)


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


def without_cache(
    original: Attention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention that does not know of a cache, so that it may be computed in tiles."""
    return original(queries, keys, values, cache=None, scale=scale, mask=mask, sinks=sinks)


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
    """A span with all keys, among `tokens`, that the tokens of a span see."""
    band = band_of(mask)
    if band is None:
        return TokenSpan(0, tokens)
    window = band.window
    return TokenSpan(0 if window is None else max(0, span.start - window + 1), span.stop)


def mask_at(mask: mx.array | str | None, span: TokenSpan, keys: TokenSpan) -> mx.array | str | None:
    """The mask between the tokens of a span and some keys.

    Args:
        mask: mask of the whole call: "causal", an array [..., T, T], or None.
        span: span of the queries.
        keys: span of the keys; each query sees at least one of them.

    Raises:
        ValueError: the mask is an unknown string.
    """
    if mask is None:
        return None
    band = band_of(mask)
    if band is not None:
        positions = range(span.start - keys.start, span.stop - keys.start)
        return simplest_mask(positions, keys.stop - keys.start, band.window)
    if isinstance(mask, str):
        raise ValueError(f"the mask {mask!r} is none that attention knows")
    # An axis of size one is broadcast; MLX would not report an index beyond it.
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., span.start : span.stop, :]
    return mask[..., keys.start : keys.stop] if mask.shape[-1] > 1 else mask
