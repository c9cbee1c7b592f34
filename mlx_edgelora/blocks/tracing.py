"""Find out what a function does while MLX traces it; nothing is computed."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

# Part of MLX's error if a traced function needs values.
EVALUATES = "Attempting to eval an array during function transformations"


def gradient_hook(when_reached: Callable[[], None]) -> Callable[[mx.array], mx.array]:
    """An identity function that calls `when_reached` if a gradient passes through it."""

    @mx.custom_function
    def identity(x: mx.array) -> mx.array:
        return mx.contiguous(x)

    @identity.vjp
    def backward(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        when_reached()
        return cotangent

    return identity


def depends_on_values(function: Callable[..., Any], inputs: Sequence[mx.array]) -> bool:
    """Whether the control flow of a function depends on the values of its inputs.

    The function is traced by `mx.compile`, which forbids any evaluation; nothing is computed.
    Compilation is switched on for the trial if it is off.
    """

    def raises(function: Callable[..., Any]) -> bool:
        try:
            mx.compile(function)(*inputs)
        except (ValueError, RuntimeError) as error:
            if EVALUATES not in str(error):
                raise
            return True
        return False

    is_off = not raises(lambda *arrays: [mx.eval(arrays), *arrays][1:])
    if is_off:
        mx.enable_compile()
    try:
        return raises(function)
    finally:
        if is_off:
            mx.disable_compile()
