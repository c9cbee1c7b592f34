"""Marks of tests for what a backend of MLX does not do."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

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


def exact_reference(model: nn.Module) -> nn.Module:
    """The model, without a product that MLX 0.32.4 gets wrong with CUDA.

    It takes a matrix for each head that is broadcast over a batch for a single matrix.
    """
    if not mx.cuda.is_available():
        return model

    def unpack(_: str, module: nn.Module) -> None:
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

    model.apply_to_modules(unpack)
    return model
