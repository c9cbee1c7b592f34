"""The one place where MLX's RMSNorm is exchanged: for a while, and undone.

Models call it as `mx.fast.rms_norm`, `nn.RMSNorm` and norms of their own alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_edgelora.layers.norm import TILE_BYTES, rms_norm


@contextmanager
def bounded_norms() -> Iterator[None]:
    """Let models normalize some tokens at a time where MLX has no fused gradient of it.

    Undone on exit, on error too. For one thread: every model of the process sees it.
    """
    if mx.default_device() == mx.gpu:
        yield
        return
    original = mx.fast.rms_norm

    def replacement(
        x: mx.array, weight: mx.array | None, eps: float, *, stream: object = None
    ) -> mx.array:
        if stream is not None:
            return original(x, weight, eps, stream=stream)
        return rms_norm(x, weight, eps, tile_bytes=TILE_BYTES)

    mx.fast.rms_norm = replacement
    try:
        yield
    finally:
        mx.fast.rms_norm = original
