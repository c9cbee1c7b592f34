"""Replace the gated delta rule of mlx-lm's models temporarily.

Models with gated delta blocks (linear attention with one decay a head or one a channel) call
`mlx_lm.models.gated_delta.gated_delta_update`, which in training and on a CPU calls
`gated_delta_ops`: a loop over tokens whose gradient keeps several states for each token. That loop
is replaced in every module that holds it, so no architecture is named.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm_gated_delta

from mlx_edgelora.blocks.attention import replace_temporarily
from mlx_edgelora.layers.gated_delta import gated_delta


@contextmanager
def chunked_gated_delta() -> Iterator[None]:
    """Let mlx-lm's models compute the gated delta rule in chunks; undone on exit.

    Every model of the process sees the replacement, so use it in one thread.
    """
    original = mlx_lm_gated_delta.gated_delta_ops

    def replacement(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        if mask is not None and mask.dtype != mx.bool_:
            return original(q, k, v, g, beta, state, mask)
        return gated_delta(q, k, v, g, beta, state, mask)

    with replace_temporarily(original, replacement):
        yield
