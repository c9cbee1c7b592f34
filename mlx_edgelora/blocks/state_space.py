"""Replace the state-space recurrence of mlx-lm's models temporarily.

Models with Mamba 2 blocks call `mlx_lm.models.ssm.ssm_update`, which for more than one token calls
`ssm_attn`. It is replaced in every module that holds it, so no architecture is named.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models import ssm

from mlx_edgelora.blocks.attention import replace_temporarily
from mlx_edgelora.layers.state_space import state_space


@contextmanager
def chunked_state_space() -> Iterator[None]:
    """Let mlx-lm's models compute the state-space recurrence in chunks; undone on exit.

    Rows with padding, as in generation, are left to mlx-lm. Every model of the process sees the
    replacement, so use it in one thread.
    """
    original = ssm.ssm_attn

    signature = inspect.signature(original)

    def replacement(*args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given["mask"] is not None or given["lengths"] is not None:
            return original(*args, **kwargs)
        x = given["x"]
        steps = ssm.compute_dt(given["dt"], given["dt_bias"], given["time_step_limit"])
        log_decay = steps * -mx.exp(given["A_log"]).astype(steps.dtype)
        y, last = state_space(
            steps[..., None] * x, log_decay, given["B"], given["C"], given["state"]
        )
        return y.astype(x.dtype) + x * given["D"][:, None], last

    with replace_temporarily(original, replacement):
        yield
