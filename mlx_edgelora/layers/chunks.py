"""A recurrence over tokens in chunks, with a gradient that recomputes one chunk at a time.

A chunk is a function of the state before it and of its tokens. The forward keeps the state before
every sqrt(n)-th of n chunks; the backward computes those between again, a group at a time, and
differentiates one chunk at a time. Memory in addition to inputs, output and gradients: about
2 sqrt(n) states and the graph of one chunk. Time: that of the chunks twice more.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import ceil, isqrt

import mlx.core as mx

from mlx_edgelora.layers.fused import is_floating
from mlx_edgelora.layers.tile_order import depend_on

# (state, *tokens) -> (y, next state): a state in float32, and arrays [B, c, ...] of c tokens.
Chunk = Callable[..., tuple[mx.array, mx.array]]


@lru_cache(maxsize=16)
def in_chunks(chunk: Chunk, size: int) -> mx.custom_function:
    """The recurrence of a chunk, as a function of the first state and of all tokens' arrays.

    Args:
        chunk: without side effects. Arrays of tokens that are not floating get no gradient.
        size: tokens of a chunk; the last one may have fewer.

    Returns:
        A function (state, *arrays [B, T, ...]) -> (y [B, T, ...], last state in float32, the
        states before each group of chunks but the first).
    """

    @mx.custom_function
    def recurrence(state: mx.array, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        state, ys, saved = state.astype(mx.float32), [], []
        none = mx.zeros((0, *state.shape))
        for group in _groups(arrays[0].shape[1], size):
            saved += [state[None]] if ys else [none]
            for start in group:
                (state,) = depend_on([state], ys[-1:])
                y, state = chunk(state, *_tokens(arrays, start, size))
                ys.append(y)
        return mx.concatenate(ys, axis=1), state, mx.concatenate(saved)

    @recurrence.vjp
    def vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple
    ) -> list[mx.array]:
        first, *arrays = primals
        dy, dstate, _ = cotangents
        varied = [number for number, array in enumerate(arrays) if is_floating(array)]
        found, after = [], [dstate]
        groups = list(_groups(arrays[0].shape[1], size))
        saved = [first.astype(mx.float32), *outputs[2]]
        for group, state in reversed(list(zip(groups, saved, strict=True))):
            states = depend_on([state], after)
            for start in group[:-1]:
                states.append(chunk(states[-1], *_tokens(arrays, start, size))[1])
            for start in reversed(group):
                parts = _tokens(arrays, start, size)
                inputs = depend_on([states.pop(), *(parts[n] for n in varied)], after)
                wanted = [dy[:, start : start + size], dstate]
                function = partial(_of_varied, chunk, parts, varied)
                dstate, *pieces = after = mx.vjp(function, inputs, wanted)[1]
                found.append(pieces)
        found.reverse()
        gradients = [mx.zeros_like(array) for array in arrays]
        for number, pieces in zip(varied, zip(*found, strict=True), strict=True):
            gradients[number] = mx.concatenate(pieces, axis=1)
        return [dstate.astype(first.dtype), *gradients]

    return recurrence


def _of_varied(
    chunk: Chunk, parts: list[mx.array], varied: list[int], state: mx.array, *values: mx.array
) -> tuple[mx.array, mx.array]:
    """A chunk with some of its arrays replaced."""
    parts = list(parts)
    for number, value in zip(varied, values, strict=True):
        parts[number] = value
    return chunk(state, *parts)


def _groups(tokens: int, size: int) -> list[range]:
    """The starts of chunks, in groups of about the square root of their number."""
    chunks = ceil(tokens / size)
    step = max(1, isqrt(chunks)) * size
    return [range(i, min(i + step, tokens), size) for i in range(0, tokens, step)]


def _tokens(arrays: list[mx.array] | tuple[mx.array, ...], start: int, size: int) -> list[mx.array]:
    return [array[:, start : start + size] for array in arrays]
