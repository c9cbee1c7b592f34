"""Let embeddings stand in for themselves in checks, so that no embedding is read from disk.

MLX reads a lazy array whole, also where one row of it is looked up. What a model gives its blocks
besides hidden states can depend on embeddings (Gemma 4's inputs of each layer), so a check that
evaluates it would read all of them, and the model would keep them in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.block_list import array_slots, bind_arrays

NAMES = ("weight", "scales", "biases")
# Exponents of two of mxfp4 scales are stored with 127 added.
EXPONENT = 120


@contextmanager
def any_embeddings(model: nn.Module) -> Iterator[None]:
    """Let all tokens have the same random embedding, in every embedding of a model.

    Memory: one row of each.
    """
    arrays = {
        f"{path}.{name}": _any_rows(name, module[name])
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        for name in NAMES
        if isinstance(module.get(name), mx.array)
    }
    with bind_arrays(array_slots(model), arrays):
        yield


def _any_rows(name: str, array: mx.array) -> mx.array:
    """An array of the same shape and dtype whose rows share memory."""
    row, key = (1, *array.shape[1:]), mx.random.key(len(array.shape))
    if array.dtype == mx.uint32:
        values = mx.random.randint(0, 2**31 - 1, row, key=key).astype(mx.uint32)
    elif name == "weight":
        values = mx.random.normal(row, key=key).astype(array.dtype)
    else:
        values = mx.full(row, EXPONENT if array.dtype == mx.uint8 else 0.01, array.dtype)
    return mx.broadcast_to(values, array.shape)
