"""Products with a frozen quantized matrix, tile by tile.

The packed matrix W [out, in] is never dequantized whole. Forward:
`y[:, t] = x W[t]^T` for one tile t of output rows after the other; backward:
`dx = sum_t dy[:, t] W[t]`, each tile dequantized again. Memory in addition to input
and output: one dequantized tile. It is exact: the same products as on a dequantized
layer, in the same dtype.

On Metal and CUDA MLX's fused `quantized_matmul` does this inside one kernel and
is the default there. On a CPU that kernel is more than 20 times slower than
dequantizing and multiplying with a good BLAS, and in bfloat16 it accumulates in
bfloat16 (6 % relative error; `benchmarks/speed.py` measures both), so tiles are
the default there.

Not optimal yet: the pieces of `y` are concatenated, which holds `y` twice for a moment.
"""

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.layers.tile_order import depend_on

# One dequantized tile. On a CPU MLX allocates some tiles ahead of their use, so the cost is a few
# of them; at 8192 x 3072 tiles of 2 to 20 MiB took the same time, and 17 to 92 MiB in all. On a
# GPU each operation takes the host some 8 microseconds, so tiles are whole matrices, or nearly.
TILE_BYTES = {mx.cpu: 2 * 2**20, mx.gpu: 128 * 2**20}


def frozen_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    tile_bytes: int | None = None,
) -> mx.array:
    """Multiply by a packed matrix that gets no gradient: `x @ dequantize(weight).T`.

    Args:
        x: [..., in], floating.
        weight, scales, biases: as `mx.quantize` returns them for [out, in].
        group_size, bits, mode: how they were packed.
        tile_bytes: bound on one dequantized tile in float32, at least one row of it; by default
            `TILE_BYTES` of the device. In 16 bits
            it has as many rows: what unpacking makes on the way does not shrink by half.

    Returns:
        [..., out] in the dtype of `x`, differentiable in `x` only.
    """
    in_dims = x.shape[-1]
    if tile_bytes is None:
        tile_bytes = TILE_BYTES[mx.default_device().type]
    rows = max(1, tile_bytes // (4 * in_dims))
    packed = (weight, scales) if biases is None else (weight, scales, biases)
    return _product(group_size, bits, mode, rows)(x, *packed)


@lru_cache(maxsize=256)
def _product(group_size: int, bits: int, mode: str, rows: int) -> mx.custom_function:
    def tiles(packed: tuple[mx.array, ...]) -> list[tuple[int, int]]:
        count = packed[0].shape[0]
        return [(start, min(start + rows, count)) for start in range(0, count, rows)]

    def dequantized(
        packed: tuple, start: int, stop: int, after: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        tile = [array[start:stop] for array in packed]
        tile = depend_on(tile, [] if after is None else [after])
        # In the activations' dtype, whatever the scales are kept in; uint8 scales are no numbers.
        floats = [a if a.dtype == mx.uint8 else a.astype(dtype) for a in tile[1:]]
        dense = dequantize(tile[0], *floats, group_size=group_size, bits=bits, mode=mode)
        return dense.astype(dtype)

    @mx.custom_function
    def product(x: mx.array, *packed: mx.array) -> mx.array:
        pieces: list[mx.array] = []
        for start, stop in tiles(packed):
            tile = dequantized(packed, start, stop, pieces[-1] if pieces else None, x.dtype)
            pieces.append(x @ tile.T)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)

    @product.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        _, *packed = primals
        dx = None
        for start, stop in tiles(packed):
            before = cotangent if dx is None else dx
            tile = dequantized(packed, start, stop, before, cotangent.dtype)
            piece = cotangent[..., start:stop]
            dx = piece @ tile if dx is None else plus_product(dx, piece, tile)
        return dx, *(mx.zeros_like(array) for array in packed)

    return product


def plus_product(y: mx.array, x: mx.array, matrix: mx.array) -> mx.array:
    """`y + x @ matrix` as one product, which MLX adds up in the memory of `y` where it is free.

    In float32 on a CPU this takes two thirds of the time of a product and a sum, and half of their
    memory for any dtype.

    Args:
        y: [..., out].
        x: [..., in], of as many rows.
        matrix: [in, out], in the dtype of `x`.

    Returns:
        [..., out] in the dtype of `y`, differentiable in all three.
    """
    if x.dtype != y.dtype or x.ndim < 2:
        return y + (x @ matrix).astype(y.dtype)
    if x.ndim == 2:
        return mx.addmm(y, x, matrix)
    return mx.unflatten(mx.addmm(y.flatten(0, -2), x.flatten(0, -2), matrix), 0, y.shape[:-1])


class DequantizedLinear(nn.QuantizedLinear):
    """A quantized linear layer that multiplies by `frozen_matmul` instead of the fused kernel."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map [..., in] to [..., out]."""
        y = frozen_product(self, x)
        return y + self["bias"] if "bias" in self else y


class DequantizedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding whose use as a head multiplies by `frozen_matmul`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Map [..., dims] to [..., num_embeddings]."""
        return frozen_product(self, x)


def frozen_product(layer: nn.Module, x: mx.array) -> mx.array:
    """Multiply [..., in] by a frozen layer's matrix, as the layer does, without its bias."""
    if "scales" not in layer:
        return x @ layer["weight"].T
    if not isinstance(layer, DequantizedLinear | DequantizedEmbedding):
        return mx.quantized_matmul(
            x,
            layer["weight"],
            scales=layer["scales"],
            biases=layer.get("biases"),
            transpose=True,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )
    return frozen_matmul(
        x,
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def resolve_kernel(kernel: str) -> tuple[str, str]:
    """The kernel to use on this device, with "auto" resolved, and the reason."""
    if kernel != "auto":
        return kernel, "set by the plan"
    on_gpu = mx.default_device() == mx.gpu
    reason = "the fastest on a GPU" if on_gpu else "the fastest on a CPU"
    return "fused" if on_gpu else "dequantize", reason
