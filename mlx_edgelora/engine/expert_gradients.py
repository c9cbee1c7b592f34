"""The gradient of a block with experts by groups, in segments that are not traced together.

    y = experts(x)                     # the block's own code up to the experts, then these
    dy = (block after the experts)'    # with y as an input
    dx = experts'(dy)                  # group by group, not traced
    block'                             # with y as an input, and x and dx as an output

What comes before the experts is computed three times in place of once, and differentiated once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_edgelora.blocks.experts import ExpertCall, handle_experts
from mlx_edgelora.layers.experts import visit_backward, visit_forward

Function = Callable[..., list[mx.array]]


class _ExpertsReached(Exception):
    """Ends a block's call at its experts, and carries the call."""

    def __init__(self, call: ExpertCall) -> None:
        self.call = call


def vjp_by_experts(
    function: Function,
    primals: list[mx.array],
    cotangents: list[mx.array],
    sums: dict[int, mx.array],
) -> tuple[list[mx.array], list[mx.array]]:
    """As `mx.vjp`, for a part of a block that calls one layer of experts, or none.

    Args:
        function: called several times.
        primals: without the adapters of experts.
        cotangents: gradients of the outputs.
        sums: evaluated float32 arrays by the `id` of an expert's adapter, to which gradients are
            added in place.

    Raises:
        RuntimeError: experts are called more than once.
    """

    def stop(call: ExpertCall) -> mx.array:
        raise _ExpertsReached(call)

    try:
        with handle_experts(stop):
            function(*primals)
    except _ExpertsReached as reached:
        call = reached.call
    else:
        return mx.vjp(function, primals, cotangents)
    mx.eval(call.x, call.indices)
    y = visit_forward(*call)

    def after(y: mx.array) -> list[mx.array]:
        with _given(y):
            return function(*primals)

    # The outputs are not kept: they hold what was computed for the gradient.
    (dy,) = mx.vjp(after, [y], cotangents)[1]
    mx.eval(dy)
    own = {name: sums[id(array)] for name, array in call.adapters.items()}
    dx = visit_backward(call.x, call.indices, dy, call.adapters, call.experts, own)
    del dy, call

    def both(*primals: mx.array) -> list[mx.array]:
        with _given(y) as inputs:
            return [*function(*primals), *inputs]

    outputs, gradients = mx.vjp(both, primals, [*cotangents, dx])
    return outputs[: len(cotangents)], gradients


@contextmanager
def _given(y: mx.array) -> Iterator[list[mx.array]]:
    """Let experts return `y`; yields a list that gets their input."""
    inputs: list[mx.array] = []

    def give(call: ExpertCall) -> mx.array:
        if inputs:
            raise RuntimeError("a block calls its experts more than once")
        inputs.append(call.x)
        return y

    with handle_experts(give):
        yield inputs
