"""Marks of tests for what a backend of MLX does not do."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.tuner.lora import LoRASwitchLinear

frees_at_once = pytest.mark.skipif(
    mx.default_device() == mx.gpu,
    reason="MLX frees buffers of a GPU only when a command buffer or graph is done",
)


@contextmanager
def skipped_without_a_kernel() -> Iterator[None]:
    """Skip a test if plain MLX has no product with a packed matrix of this shape here (CUDA)."""
    try:
        yield
    except RuntimeError as error:
        if "No implementation for problem shape" in str(error):
            pytest.skip(str(error))
        raise


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class PickedLinear(LoRASwitchLinear):
    """mlx-lm's layer without `gather_mm`, for few tokens."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = self.dropout(x) @ self.lora_a[indices].swapaxes(-1, -2)
        return y + (self.scale * (z @ self.lora_b[indices].swapaxes(-1, -2))).astype(x.dtype)


def exact_reference(model: nn.Module) -> nn.Module:
    """The model, without what MLX 0.32.4 has no kernel for on CUDA.

    These are products with a packed matrix for each head, broadcast over a batch, and the float32
    gradient of `gather_mm` where few tokens are not sorted.
    """
    if not mx.cuda.is_available():
        return model

    def replace(_: str, module: nn.Module) -> None:
        if type(module) is LoRASwitchLinear:
            module.__class__ = PickedLinear
        for name, child in module.children().items():
            if isinstance(child, QuantizedMultiLinear):
                matrices = mx.dequantize(
                    child.weight,
                    child.scales,
                    child.get("biases"),
                    group_size=child.group_size,
                    bits=child.bits,
                    mode=child.mode,
                )
                heads, outputs, inputs = matrices.shape
                module[name] = MultiLinear(inputs, outputs, heads)
                module[name].weight = matrices
                module[name].freeze()

    model.apply_to_modules(replace)
    return model
