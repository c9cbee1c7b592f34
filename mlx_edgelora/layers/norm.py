"""RMSNorm whose backward is computed for a few tokens at a time.

`y = x r w` with `r = 1 / sqrt(mean(x^2) + eps)`; with `g = dy w` its gradient is

    dx = r (g - x r^2 mean(g x)),   dw = sum over tokens of dy x r.

MLX has fused kernels for both directions on a GPU. On a CPU the gradient is a graph of plain
operations over all tokens, which holds five arrays of tokens x hidden in float32 whatever
the activations are, and more with 16 bits: of a tile's backward that was the most.

Memory in addition to x, dy and dx: dx once more, as pieces before they are joined, and about ten
arrays of `tile_bytes`, because MLX allocates about 50 operations ahead (pieces depend on one
another by `mx.depends`). Time: that of MLX's own norm.
"""

from functools import lru_cache

import mlx.core as mx

from mlx_edgelora.layers.tile_order import depend_on

TILE_BYTES = 2**18

# MLX's own function, which models may replace later.
_FUSED = mx.fast.rms_norm


def rms_norm(
    x: mx.array, weight: mx.array | None, eps: float, *, tile_bytes: int = TILE_BYTES
) -> mx.array:
    """Normalize over the last axis, as `mx.fast.rms_norm`.

    Args:
        x: [..., d], floating.
        weight: [d], or None for ones.
        eps: added to the mean of squares.
        tile_bytes: bound on a float32 array of the tokens computed at a time, at least one token.

    Returns:
        [..., d] in the dtype of `x`, differentiable in both arrays.
    """
    width = x.shape[-1]
    rows = max(1, tile_bytes // (4 * width))
    if x.size <= rows * width:
        return _FUSED(x, weight, eps)
    arrays = (x.reshape(-1, width),) + (() if weight is None else (weight,))
    return _norm(float(eps), rows)(*arrays).reshape(x.shape)


@lru_cache(maxsize=64)
def _norm(eps: float, rows: int) -> mx.custom_function:
    def pieces(*arrays: mx.array) -> list[tuple[mx.array, ...]]:
        starts = range(0, arrays[0].shape[0], rows)
        return [tuple(array[start : start + rows] for array in arrays) for start in starts]

    @mx.custom_function
    def norm(x: mx.array, *weight: mx.array) -> mx.array:
        results: list[mx.array] = []
        for (piece,) in pieces(x):
            ready = depend_on([piece], results[-1:])
            results.append(_FUSED(ready[0], *(weight or (None,)), eps))
        return mx.concatenate(results)

    @norm.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        # MLX passes a single array as itself, several arrays as a sequence.
        x, *weight = [primals] if isinstance(primals, mx.array) else primals
        results: list[mx.array] = []
        dweight: mx.array | None = None
        for pair in pieces(x, cotangent):
            ready = depend_on(list(pair), results[-1:])
            x_piece, dy = (part.astype(mx.float32) for part in ready)
            inverse = mx.rsqrt(mx.square(x_piece).mean(-1, keepdims=True) + eps)
            g = dy
            if weight:
                share = (dy * x_piece * inverse).sum(0)
                dweight = share if dweight is None else dweight + share
                g = dy * weight[0].astype(mx.float32)
            mean = (g * x_piece).mean(-1, keepdims=True) * inverse * inverse
            results.append((inverse * (g - x_piece * mean)).astype(x.dtype))
        dx = mx.concatenate(results)
        return (dx, dweight.astype(weight[0].dtype)) if weight else dx

    return norm
