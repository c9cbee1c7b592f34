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
from mlx_edgelora.layers.tile_order import Span, depend_on

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


def heads_at_a_time(keys: HeadProduct, values: HeadProduct, added: int = 0) -> int:
    """Number of heads that are computed at a time; all if they are few bytes.

    Args:
        keys, values: [B, H, Tk, D] and [B, H, Tk, Dv].
        added: entries that are appended to each key.
    """
    batch, heads, tokens, size = keys.shape
    row = 4 * batch * tokens * (size + added + values.shape[-1])
    return min(heads, max(1, HEAD_BYTES // row))


def append(
    queries: mx.array, keys: mx.array, added: Sequence[mx.array], scale: float
) -> tuple[mx.array, mx.array]:
    """Queries and keys whose scores are those of the given ones plus the products of others.

    Args:
        queries, keys: [B, H, Tq, D] and [B, Hkv, Tk, D].
        added: [B, H, Tq, r] and [B, Hkv or 1, Tk, r], whose products are added to scores.
        scale: factor of the scores, which those products do not have.

    Returns:
        [B, H, Tq, D + r] and [B, Hkv, Tk, D + r].
    """
    more, others = added
    more = (more.astype(mx.float32) / scale).astype(more.dtype)
    others = mx.broadcast_to(others, (*keys.shape[:3], others.shape[-1]))
    joined = [(queries, more), (keys, others)]
    return tuple(mx.concatenate(promote(*pair), axis=-1) for pair in joined)


def attend_by_heads(
    queries: mx.array,
    keys: HeadProduct,
    values: HeadProduct,
    *,
    scale: float,
    mask: Mask,
    added: Sequence[mx.array] = (),
) -> mx.array:
    """Attention over keys and values that are made for some heads at a time.

    Args:
        queries: [B, H, Tq, D].
        keys, values: [B, H, Tk, D] and [B, H, Tk, Dv].
        scale: factor of the scores.
        mask: see `tiled_attention`.
        added: none, or [B, H, Tq, r] and [B, H or 1, Tk, r], whose products are added to scores.

    Returns:
        [B, H, Tq, Dv] in the common dtype, differentiable in `queries`, what keys and values are
        made of, `added` and a floating mask.
    """
    heads, count = queries.shape[1], len(keys.packed)
    step = heads_at_a_time(keys, values, added[1].shape[-1] if added else 0)
    groups = [(start, min(start + step, heads)) for start in range(0, heads, step)]
    given = isinstance(mask, mx.array)
    if given:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    floats = [mask] if given and is_floating(mask) else []
    inputs = [queries, keys.x, values.x, *added, *floats]

    def group(
        span: Span,
        packed: Sequence[mx.array],
        q: mx.array,
        kx: mx.array,
        vx: mx.array,
        *others: mx.array,
    ) -> mx.array:
        some = [array[slice(*span)] for array in packed]
        k, v = keys.product(kx, *some[:count]), values.product(vx, *some[count:])
        if added:
            q, k = append(q, k, others[:2], scale)
        own = others[-1] if floats else some_heads(mask, span) if given else mask
        return tiled_attention(*promote(q, k, v), scale=scale, mask=own)

    @mx.custom_function
    def attention(*arrays: mx.array) -> mx.array:
        primals, packed = arrays[: len(inputs)], arrays[len(inputs) :]
        pieces: list[mx.array] = []
        for span in groups:
            some = [some_heads(array, span) for array in primals]
            pieces.append(group(span, packed, *depend_on(some, pieces[-1:])))
        return mx.concatenate(pieces, axis=1)

    @attention.vjp
    def backward(arrays: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        primals, packed = arrays[: len(inputs)], arrays[len(inputs) :]
        sums = [_HeadSum(array, heads) for array in primals]
        after: list[mx.array] = []
        for span in groups:
            some = depend_on([some_heads(array, span) for array in primals], after)
            own = some_heads(cotangent, span)
            found = mx.vjp(partial(group, span, packed), some, [own])[1]
            after = [total.add(part) for total, part in zip(sums, found, strict=True)]
        zeros = [mx.zeros_like(array) for array in packed]
        return [*(total.result() for total in sums), *zeros]

    return attention(*inputs, *keys.packed, *values.packed)


def some_heads(array: mx.array, span: Span) -> mx.array:
    """Some heads of [B, H, ...]; all that there is of an array [B, 1, ...] that heads share."""
    return array if array.shape[1] == 1 else array[:, slice(*span)]


class _HeadSum:
    """The gradient of an array, of some heads after the others.

    In float32 a sum over them if heads share the array, else they are put side by side.
    """

    def __init__(self, array: mx.array, heads: int) -> None:
        self._shared, self._dtype = array.shape[1] == 1 < heads, array.dtype
        self._parts: list[mx.array] = []

    def add(self, part: mx.array) -> mx.array:
        """Add the gradient of some heads; returns what is kept of it."""
        if not self._shared:
            self._parts.append(part)
        elif self._parts:
            self._parts[0] = self._parts[0] + part.astype(mx.float32)
        else:
            self._parts.append(part.astype(mx.float32))
        return self._parts[-1]

    def result(self) -> mx.array:
        """The whole gradient in the array's dtype."""
        return mx.concatenate(self._parts, axis=1).astype(self._dtype)
