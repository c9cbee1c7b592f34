"""Replace MLX's RMSNorm temporarily.

`nn.RMSNorm` and the norms of models all call `mx.fast.rms_norm`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_edgelora.layers.norm import TILE_BYTES, rms_norm


@contextmanager
def bounded_norms() -> Iterator[None]:
    """Let models normalize a few tokens at a time if MLX has no fused gradient; undone on exit.

    Every model of the process sees the replacement, so use it in one thread.
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
