"""Marks of tests for what a backend of MLX does not do."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

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
