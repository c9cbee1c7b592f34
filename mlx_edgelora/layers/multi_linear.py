"""Products with a frozen packed matrix for each head, as multi-head latent attention has them.

`mlx_lm.models.mla` makes keys and values of all heads from latents, `k[h] = c W[h]`, and so needs
the sum over heads in the gradient of the latents, `dc = sum_h dk[h] W[h]^T`, for which autodiff
makes an array [heads, tokens, latents]. Here some heads at a time are unpacked and multiplied in
the backward, and added in float32. Memory in addition to input and output: the unpacked matrices of
all heads in the forward, of some in the backward.

Matrices that are not packed are multiplied as they are, for as many heads as attention asks for.

MLX's own kernel is what a GPU uses. On a CPU it has the speed and, in bfloat16, the errors that
`layers/linear.py` tells of.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.layers.head_attention import HeadProduct
from mlx_edgelora.layers.linear import TILE_BYTES
from mlx_edgelora.layers.tile_order import depend_on


class HeadsMultiLinear(QuantizedMultiLinear):
    """As `QuantizedMultiLinear`, for attention that makes keys and values of some heads at a time.

    It multiplies by MLX's own kernel.
    """

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Map [..., heads or 1, t, n] to [..., heads, t, m] by a matrix [m, n] for each head.

        Args:
            x: floating.
            transpose: False if the matrices are [n, m].
        """
        biases = self.get("biases")
        packed = [self["weight"], self["scales"]] + ([] if biases is None else [biases])
        product = self._product(transpose)
        y = product(x, *packed)
        shared = x.ndim == 4 and x.shape[1] == 1 != y.shape[1]
        return HeadProduct(y, x, packed, product) if shared else y

    def _product(self, transpose: bool) -> Callable[..., mx.array]:
        settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return partial(_fused, transpose=transpose, **settings)


class UnpackedMultiLinear(MultiLinear):
    """As `MultiLinear`, for attention that makes keys and values of some heads at a time.

    If it is trained, those of all heads are made at once.
    """

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Map [..., heads or 1, t, n] to [..., heads, t, m]; see `HeadsMultiLinear`."""
        product = partial(_unpacked, transpose=transpose)
        y = product(x, self["weight"])
        shared = x.ndim == 4 and x.shape[1] == 1 != y.shape[1]
        frozen = not self.trainable_parameters()
        return HeadProduct(y, x, [self["weight"]], product) if shared and frozen else y


class DequantizedMultiLinear(HeadsMultiLinear):
    """As `HeadsMultiLinear`, multiplying by unpacked matrices."""

    def _product(self, transpose: bool) -> Callable[..., mx.array]:
        settings = self.group_size, self.bits, self.mode
        return _product(*settings, transpose, TILE_BYTES[mx.default_device().type])


def _unpacked(x: mx.array, weight: mx.array, *, transpose: bool) -> mx.array:
    return x @ (weight.swapaxes(-1, -2) if transpose else weight)


def _fused(
    x: mx.array, weight: mx.array, scales: mx.array, *biases: mx.array, **settings: Any
) -> mx.array:
    if x.ndim == 3:
        return mx.quantized_matmul(x, weight, scales, *biases, **settings)
    # MLX 0.32.4 has no kernel for matrices that are broadcast over a batch on CUDA (other versions
    # take them for a single one). So a batch is more tokens.
    batch, heads, tokens, _ = x.shape
    y = mx.quantized_matmul(
        x.swapaxes(0, 1).reshape(heads, batch * tokens, -1), weight, scales, *biases, **settings
    )
    return y.reshape(-1, batch, tokens, y.shape[-1]).swapaxes(0, 1)


@lru_cache(maxsize=64)
def _product(
    group_size: int, bits: int, mode: str, transpose: bool, tile_bytes: int
) -> mx.custom_function:
    def unpacked(arrays: list[mx.array], dtype: mx.Dtype) -> mx.array:
        """Matrices [heads, m, n]."""
        heads = arrays[0].shape[0]
        # In the activations' dtype, as in `layers/linear.py`; uint8 scales are no numbers.
        flat = [array.flatten(0, 1) for array in arrays]
        floats = [a if a.dtype == mx.uint8 else a.astype(dtype) for a in flat[1:]]
        dense = dequantize(flat[0], *floats, group_size=group_size, bits=bits, mode=mode)
        return dense.astype(dtype).reshape(heads, -1, dense.shape[-1])

    @mx.custom_function
    def product(x: mx.array, *packed: mx.array) -> mx.array:
        matrices = unpacked(list(packed), x.dtype)
        return x @ (matrices.swapaxes(-1, -2) if transpose else matrices)

    @product.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        x, *packed = primals
        zeros = [mx.zeros_like(array) for array in packed]
        heads, rows, _ = packed[0].shape
        if x.shape[-3] == heads:
            matrices = unpacked(packed, cotangent.dtype)
            return cotangent @ (matrices if transpose else matrices.swapaxes(-1, -2)), *zeros
        # Bytes of a head: rows times what the packed columns stand for.
        step = max(1, tile_bytes // (4 * rows * packed[1].shape[-1] * group_size))
        total = None
        for start in range(0, heads, step):
            some = [array[start : start + step] for array in packed]
            some = depend_on(some, [cotangent if total is None else total])
            matrices = unpacked(some, cotangent.dtype)
            if not transpose:
                matrices = matrices.swapaxes(-1, -2)
            piece = cotangent[..., start : start + step, :, :].swapaxes(-2, -3).flatten(-2)
            more = (piece @ matrices.flatten(0, 1)).astype(mx.float32)
            total = more if total is None else total + more
        return mx.expand_dims(total, -3).astype(x.dtype), *zeros

    return product
