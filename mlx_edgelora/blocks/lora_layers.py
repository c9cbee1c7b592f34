"""mlx-lm's LoRA and DoRA layers with the low-rank branch in the dtype of the activations."""

import mlx.core as mx
from mlx_lm.tuner.dora import DoRALinear as MlxDoRALinear
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear
from mlx_lm.tuner.lora import LoRASwitchLinear as MlxLoRASwitchLinear

from mlx_edgelora.layers.dora import row_norms
from mlx_edgelora.layers.linear import frozen_product, plus_product

# Ranks of adapters of experts on CUDA are multiples of it.
RANKS = 8


class LoRALinear(MlxLoRALinear):
    """mlx-lm's LoRA layer with the low-rank branch in the dtype of the activations.

    mlx-lm multiplies bfloat16 activations by float32 adapters, which makes float32
    copies of every adapted layer's input and output: about half of a block's
    backward memory. Adapters and their gradients stay float32 here too. In float32
    the two layers compute the same.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Map [..., in] to [..., out], in the dtype of `x`."""
        rows = x if x.ndim < 3 else x.flatten(0, -2)  # once, not in each of three products
        z = self.dropout(rows) @ self.lora_a.astype(x.dtype)
        y = plus_product(self.linear(rows), self.scale * z, self.lora_b.astype(x.dtype))
        return y if rows is x else mx.unflatten(y, 0, x.shape[:-1])


class DoRALinear(MlxDoRALinear):
    """mlx-lm's DoRA layer with a matrix that is never unpacked whole.

    The low-rank branch has the dtype of the activations, as in `LoRALinear`.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Map [..., in] to [..., out], in the dtype of `x`."""
        y = frozen_product(self.linear, x)
        z = self.dropout(x) @ self.lora_a.astype(x.dtype)
        y = plus_product(y, self.scale * z, self.lora_b.astype(x.dtype))
        y = self.gain().astype(y.dtype) * y
        return y + self.linear["bias"] if "bias" in self.linear else y

    def gain(self) -> mx.array:
        """Factor of each output, float32 [out]; differentiable in `m` only."""
        return self.m / row_norms(self.linear, self.lora_a, self.lora_b, self.scale)


class LoRASwitchLinear(MlxLoRASwitchLinear):
    """mlx-lm's LoRA layer over experts with the low-rank branch in the activations' dtype."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map [..., 1, in] through the experts named by `indices` to [..., 1, out]."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = self.dropout(x)
        # MLX's gather_mm supports only float32 on a CPU.
        dtype = x.dtype if mx.default_device() == mx.gpu else mx.float32
        for factor in (_whole_ranks(self.lora_a, 1), self.scale * _whole_ranks(self.lora_b, 2)):
            z = _multiply(z, factor.astype(dtype), indices, sorted_indices)
        return y + z.astype(y.dtype)


def _multiply(x: mx.array, factor: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Map [..., 1, in] by the matrices [out, in] of `factor` that `indices` name."""
    if mx.cuda.is_available() and factor.dtype == mx.float32 and not sorted_indices:
        # MLX 0.32.4 cannot start the kernel of this gradient with more than 64 outputs. Few tokens
        # are not sorted.
        return x @ factor[indices].swapaxes(-1, -2)
    return mx.gather_mm(
        x, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
    )


def _whole_ranks(factor: mx.array, axis: int) -> mx.array:
    """A factor [experts, ...] with zeros up to a rank that MLX's CUDA kernel can read.

    In 0.32.4 it reads 16 bytes at a time where it needs no transposed matrix, aligned or not.
    """
    missing = -factor.shape[axis] % RANKS if mx.cuda.is_available() else 0
    if not missing:
        return factor
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, missing)
    return mx.pad(factor, widths)
