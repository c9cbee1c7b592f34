"""Attention whose keys and values of all heads are never in memory: some heads at a time.

Multi-head latent attention (arXiv 2405.04434) makes keys and values of each head from latents that
all heads share, `k[h] = c W[h]`. For some heads after the others,

    k, v = c Wk[heads], c Wv[heads];   out[heads] = attention(q[heads], k, v)

and in the backward the same again, with its gradient; those of the latents are added in float32.
Memory in addition to inputs, output and gradients: keys, values and gradients of `HEAD_BYTES`, what
attention in tiles takes, and the gradient of the latents in float32. Time: keys, values and the
forward once more in the backward.
"""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from mlx_edgelora.layers.attention import Mask, promote, tiled_attention
from mlx_edgelora.layers.fused import is_floating
from mlx_edgelora.layers.tile_order import depend_on

# Keys and values in float32 of the heads that are computed at a time.
HEAD_BYTES = 8 * 2**20


class HeadProduct(mx.array):
    """What a packed matrix for each head makes of an array that all heads share.

    Args:
        array: the product [B, heads, T, n], not evaluated unless it is used.
        x: [B, 1, T, m].
        packed: frozen arrays [heads, ...].
        product: maps `x` and the packed arrays of some heads to their product.
    """

    def __init__(
        self,
        array: mx.array,
        x: mx.array,
        packed: Sequence[mx.array],
        product: Callable[..., mx.array],
    ) -> None:
        super().__init__(array)
        self.x, self.packed, self.product = x, tuple(packed), product


def heads_at_a_time(keys: HeadProduct, values: HeadProduct) -> int:
    """Number of heads that are computed at a time; all if they are few bytes."""
    batch, heads, tokens, size = keys.shape
    return min(heads, max(1, HEAD_BYTES // (4 * batch * tokens * (size + values.shape[-1]))))


def attend_by_heads(
    queries: mx.array, keys: HeadProduct, values: HeadProduct, *, scale: float, mask: Mask
) -> mx.array:
    """Attention over keys and values that are made for some heads at a time.

    Args:
        queries: [B, H, Tq, D].
        keys, values: [B, H, Tk, D] and [B, H, Tk, Dv].
        scale: factor of the scores.
        mask: see `tiled_attention`.

    Returns:
        [B, H, Tq, Dv] in the common dtype, differentiable in `queries`, what keys and values are
        made of, and a floating mask.
    """
    step, heads, count = heads_at_a_time(keys, values), queries.shape[1], len(keys.packed)
    groups = [(start, min(start + step, heads)) for start in range(0, heads, step)]
    given = isinstance(mask, mx.array)
    if given:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    floats = [mask] if given and is_floating(mask) else []

    def part(array: mx.array, start: int, stop: int) -> mx.array:
        return array if array.shape[1] == 1 else array[:, start:stop]

    def group(
        span: tuple[int, int],
        packed: Sequence[mx.array],
        q: mx.array,
        kx: mx.array,
        vx: mx.array,
        *added: mx.array,
    ) -> mx.array:
        some = [array[slice(*span)] for array in packed]
        k, v = keys.product(kx, *some[:count]), values.product(vx, *some[count:])
        own = added[0] if added else part(mask, *span) if given else mask
        return tiled_attention(*promote(q, k, v), scale=scale, mask=own)

    def inputs_of(primals: Sequence[mx.array], span: tuple[int, int]) -> list[mx.array]:
        q, kx, vx, *added = primals
        return [q[:, slice(*span)], kx, vx, *(part(array, *span) for array in added)]

    @mx.custom_function
    def attention(*arrays: mx.array) -> mx.array:
        primals, packed = arrays[: 3 + len(floats)], arrays[3 + len(floats) :]
        pieces: list[mx.array] = []
        for span in groups:
            inputs = depend_on(inputs_of(primals, span), pieces[-1:])
            pieces.append(group(span, packed, *inputs))
        return mx.concatenate(pieces, axis=1)

    @attention.vjp
    def backward(arrays: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        primals, packed = arrays[: 3 + len(floats)], arrays[3 + len(floats) :]
        latents: list[mx.array] = []
        pieces: list[list[mx.array]] = []
        for span in groups:
            inputs = depend_on(inputs_of(primals, span), latents)
            own = cotangent[:, slice(*span)]
            found = mx.vjp(partial(group, span, packed), inputs, [own])[1]
            more = [array.astype(mx.float32) for array in found[1:3]]
            latents = [a + b for a, b in zip(latents, more, strict=True)] if latents else more
            pieces.append([found[0], *found[3:]])
        dq, *dmask = zip(*pieces, strict=True)
        gradients = [mx.concatenate(dq, axis=1)]
        gradients += [a.astype(b.dtype) for a, b in zip(latents, primals[1:3], strict=True)]
        for array, parts in zip(primals[3:], dmask, strict=True):
            shared = array.shape[1] == 1
            gradients.append(sum(parts[1:], parts[0]) if shared else mx.concatenate(parts, axis=1))
        return [*gradients, *(mx.zeros_like(array) for array in packed)]

    return attention(queries, keys.x, values.x, *floats, *keys.packed, *values.packed)
