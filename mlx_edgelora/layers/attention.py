"""Attention whose forward and backward never hold tokens x tokens.

The algorithm is FlashAttention's (arXiv 2205.14135 and 2307.08691) in plain MLX
operations. Forward: for one tile of queries after the other, over the tiles of keys it may
see, with running maximum and sum of the softmax. Backward: the probabilities P of a tile
are computed again from those two, and with D = rowsum(dO * O)

    dV += P^T dO,   dS = P * (dO V^T - D),   dQ += dS K * scale,   dK += dS^T Q * scale.

A floating mask is added to the scores, so its gradient is dS, summed over what it was broadcast
to. Masks of bool have none.

All of it in float32, whatever the inputs are. Keys and values are never repeated for the
query heads that share them; tiles that a causal mask or a window hides are not computed.

Time: O(Tq Tk), one product Q K^T more than autodiff has. Memory in addition to the output and the
gradients, with G = H / Hkv query heads to a key head:

    10 (tile_bytes + 4 G sqrt(tile_bytes / 4G) max(D, Dv)) + 8 (G Tq D + Tk (D + Dv)) bytes

at most: scores and rows of some tiles, because MLX allocates about 50 operations ahead of
what it runs (each tile waits for the one before by `mx.depends`); and one key head's
results in float32, twice. Those are written into the output in place, for which MLX must be
done with all that reads the output: it is, given enough operations between. With fewer
tiles a head than that takes, heads do not wait for one another to be written, and output
and gradients may be held twice, as concatenating would.

Saved are the maximum and the sum, not their log-sum-exp: in a row whose keys are all
masked it forgets how many they are.

Not optimal yet: of tiles on the causal diagonal half is computed for nothing; a single
key head (B * Hkv = 1) is held twice.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_edgelora.layers.fused import Backend, use_fused
from mlx_edgelora.layers.grid import AttentionSpec, Band, Grid, backward, forward
from mlx_edgelora.layers.key_sums import KeySums

__all__ = ["TILE_BYTES", "Backend", "Band", "KeySums", "promote", "tiled_attention", "use_fused"]

# One tile of scores. At 24 heads of 128 and 2048 tokens 1 to 8 MiB took the same time.
TILE_BYTES = 2**20
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

Mask = str | mx.array | Band | None


def tiled_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Mask = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    tile_bytes: int | None = None,
    sums: KeySums | None = None,
) -> mx.array:
    """Exact attention, as `mx.fast.scaled_dot_product_attention`, in tiles.

    Args:
        q: [B, H, Tq, D], float32, float16 or bfloat16.
        k, v: [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv] of the same dtype; Hkv divides H.
        scale: factor of the scores.
        mask: "causal" (the last query sees the last key; Tq <= Tk), a `Band` under which
            each query sees at least one key, or an array that broadcasts to [B, H, Tq, Tk]:
            bool (True is seen) or floating (added, and differentiable). A row that
            sees nothing is the mean of `v`, as in MLX; -inf throughout a row does the same
            here, and is NaN in MLX.
        window: with "causal", each query sees this many keys, its own among them.
        sinks: [H], one more logit for each head that has no value.
        tile_bytes: bound on one tile of float32 scores, at least one score for each query
            head that shares a key head; `TILE_BYTES` if None.
        sums: where the gradients of `k` and `v` go; zeros are given for them.

    Returns:
        [B, H, Tq, Dv] in the dtype of `q`, differentiable in `q`, `k`, `v`, `sinks` and a
        floating mask. The gradient of a mask takes its size in float32, twice for a moment.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
    """
    if window is not None:
        if window < 1 or not isinstance(mask, str):
            raise ValueError(f'A window is 1 or more, with mask="causal"; got {window}.')
        mask = Band(window=window)
    _check(q, k, v, mask, sinks, tile_bytes)
    _check_sight(mask, k.shape[2])
    spec, arrays = _call(q, k, v, scale, mask, sinks, tile_bytes)
    # Arrays of positions differ in every batch, so functions with them are not cached.
    new = isinstance(mask, Band) and isinstance(mask.positions, np.ndarray)
    if sums is not None:
        function = _attention.__wrapped__(spec, sums)
    else:
        function = _attention.__wrapped__(spec) if new else _attention(spec)
    return function(*arrays)[0]


def promote(*arrays: mx.array) -> list[mx.array]:
    """Cast arrays to the common dtype in which MLX's own attention computes."""
    dtype = mx.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def _call(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    tile_bytes: int | None,
) -> tuple[AttentionSpec, tuple[mx.array, ...]]:
    """The fixed settings of a checked call, and its arrays."""
    tile_bytes = TILE_BYTES if tile_bytes is None else tile_bytes
    extra = [] if sinks is None else [sinks]
    if isinstance(mask, mx.array):
        extra.append(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    band = Band() if isinstance(mask, str) else mask if isinstance(mask, Band) else None
    return AttentionSpec(float(scale), band, sinks is not None, int(tile_bytes)), (q, k, v, *extra)


def _check(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: Mask,
    sinks: mx.array | None,
    tile_bytes: int | None,
) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if {q.ndim, k.ndim, v.ndim} != {4} or 0 in (q.size, k.size, v.size):
        raise ValueError(f"Attention needs q, k and v of 4 axes, none empty; got {shapes}.")
    if k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"Batch, heads, keys or head sizes do not match: {shapes}.")
    if {k.dtype, v.dtype} != {q.dtype} or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must share a float dtype; got {q.dtype}, {k.dtype}, {v.dtype}.")
    _check_mask(mask, (*q.shape[:3], k.shape[2]))
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"Sinks are one for each of {q.shape[1]} heads; got {sinks.shape}.")
    if tile_bytes is not None and tile_bytes < 1:
        raise ValueError(f"A tile has 1 byte or more; got {tile_bytes}.")


def _check_mask(mask: Mask, full: tuple[int, ...]) -> None:
    if isinstance(mask, mx.array):
        _check_array(mask, full)
    elif isinstance(mask, str) and mask != "causal":
        raise ValueError(f'A mask is "causal", an array or None; got "{mask}".')
    elif mask is not None:
        _check_band(mask if isinstance(mask, Band) else Band(), *full[2:])


def _check_band(band: Band, queries: int, keys: int) -> None:
    positions, window = band
    if window is not None and window < 1:
        raise ValueError(f"A window is 1 or more; got {window}.")
    if positions is None and queries > keys:
        raise ValueError(f"Causal needs no more queries than keys; got {queries}, {keys}.")
    if positions is not None:
        gaps = np.diff(positions)
        run = not isinstance(positions, range) or (gaps == 1).all()
        if len(positions) != queries or (gaps < 1).any() or not run:
            raise ValueError(
                f"Positions are {queries} ascending ones, a range in steps of 1; got {positions}."
            )


def _check_sight(mask: Mask, keys: int) -> None:
    """Check that each query sees a key: tiles without visible keys are skipped."""
    if not isinstance(mask, Band) or mask.positions is None:
        return
    first, last = int(mask.positions[0]), int(mask.positions[-1])
    if first < 0 or (mask.window is not None and last - mask.window + 1 >= keys):
        raise ValueError(
            f"Each query must see a key; got positions {first} to {last} and a window of "
            f"{mask.window} over {keys} keys."
        )


def _check_array(mask: mx.array, full: tuple[int, ...]) -> None:
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.ndim > 4 or any(size not in (1, most) for size, most in sizes):
        raise ValueError(f"A mask of {mask.shape} does not broadcast to {full}.")
    if mask.dtype not in (mx.bool_, *DTYPES):
        raise ValueError(f"A mask is bool or floating; got {mask.dtype}.")


@lru_cache(maxsize=256)
def _attention(spec: AttentionSpec, sums: KeySums | None = None) -> mx.custom_function:
    @mx.custom_function
    def attention(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        return forward(Grid(spec, arrays))

    @attention.vjp
    def vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple
    ) -> list[mx.array]:
        grid = Grid(spec, primals, sums)
        gradients = backward(grid, cotangents[0], *outputs, sums)
        if grid.mask is not None and not grid.floats:
            gradients.append(mx.zeros_like(grid.mask))
        return gradients

    return attention
