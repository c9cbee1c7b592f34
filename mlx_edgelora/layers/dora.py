"""The norms of DoRA: one for each row of W + s B^T A^T, with W never unpacked whole.

DoRA (arXiv 2402.09353) scales each output of an adapted layer by `m / norm`, where m is trained and
norm belongs to the adapted row. As in mlx-lm the norm is a constant to the gradient (section 4.3 of
the paper), so that rows can be unpacked, adapted, reduced to a number and dropped, some at a time.

Memory: a few tiles of `TILE_BYTES`, because MLX allocates ahead (tiles depend on one another by
`mx.depends`). Time: one unpacking of W, and `out * in * rank` multiplications; as much as the
layer itself takes for a few tokens. Not optimal yet: a block that is computed by tiles of tokens
computes its norms for each tile.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.layers.linear import TILE_BYTES
from mlx_edgelora.layers.tile_order import depend_on


def row_norms(
    linear: nn.Module,
    lora_a: mx.array | None = None,
    lora_b: mx.array | None = None,
    scale: float = 1.0,
    *,
    tile_bytes: int | None = None,
) -> mx.array:
    """Norms of the rows of a frozen matrix, adapted or not.

    Args:
        linear: a linear layer, quantized or not; unpacked in the dtype of its scales.
        lora_a, lora_b: [in, rank] and [rank, out]; None for the matrix alone.
        scale: of the adapter.
        tile_bytes: bound on the rows that are unpacked at a time, in float32, at least one row;
            by default `TILE_BYTES` of the device.

    Returns:
        [out], float32, a constant to gradients.
    """
    arrays = [linear.get(name) for name in ("weight", "scales", "biases")]
    packed = [array for array in arrays if array is not None]
    out_dims, width = packed[0].shape
    in_dims = width * 32 // linear.bits if len(packed) > 1 else width
    step = max(1, (tile_bytes or TILE_BYTES[mx.default_device().type]) // (4 * in_dims))
    pieces: list[mx.array] = []
    for start in range(0, out_dims, step):
        rows = slice(start, start + step)
        tile = depend_on([array[rows] for array in packed], pieces[-1:])
        dense = tile[0]
        if len(tile) > 1:
            settings = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
            dense = dequantize(*tile, **settings)
        if lora_b is not None:
            dense = dense + (scale * lora_b.T[rows]) @ lora_a.T
        pieces.append(mx.linalg.norm(dense.astype(mx.float32), axis=1))
    return mx.stop_gradient(pieces[0] if len(pieces) == 1 else mx.concatenate(pieces))
