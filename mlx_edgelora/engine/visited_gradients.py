"""The gradient of a block with a part that is visited, in segments that are not traced together.

    y = part(x)                     # the block's own code up to the part, then this one
    dy = (block after the part)'    # with y as an input
    dx = part'(dy)                  # piece by piece, not traced
    block'                          # with y as an input, and x and dx as an output

The part is a gated MLP that is read by rows (`blocks/visits.py`). What comes before it is computed
three times in place of once, and differentiated once. It is not in memory while the part is
computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_edgelora.blocks.visits import VisitedCall, handle_visits

Function = Callable[..., list[mx.array]]


class _PartReached(Exception):
    """Ends a block's call at the part that is visited, and carries the call."""

    def __init__(self, call: VisitedCall) -> None:
        self.call = call


def vjp_with_visits(
    function: Function,
    primals: list[mx.array],
    cotangents: list[mx.array],
    sums: dict[int, mx.array],
) -> tuple[list[mx.array], list[mx.array]]:
    """As `mx.vjp`, for a function that calls one part that is visited, or none.

    Args:
        function: called several times.
        primals: without the adapters of the part.
        cotangents: gradients of the outputs.
        sums: evaluated float32 arrays by the `id` of an adapter of the part, to which gradients
            are added in place.

    Raises:
        RuntimeError: parts are visited more than once.
    """

    def stop(call: VisitedCall) -> mx.array:
        raise _PartReached(call)

    try:
        with handle_visits(stop):
            function(*primals)
    except _PartReached as reached:
        call = reached.call
    else:
        return mx.vjp(function, primals, cotangents)
    mx.eval(call.inputs())
    y = call.forward()

    def after(y: mx.array) -> list[mx.array]:
        with _given(y):
            return function(*primals)

    # The outputs are not kept: they hold what was computed for the gradient.
    (dy,) = mx.vjp(after, [y], cotangents)[1]
    mx.eval(dy)
    own = {name: sums[id(array)] for name, array in call.adapters.items()}
    dx = call.backward(dy, own)
    del dy, call

    def both(*primals: mx.array) -> list[mx.array]:
        with _given(y) as inputs:
            return [*function(*primals), *inputs]

    outputs, gradients = mx.vjp(both, primals, [*cotangents, dx])
    return outputs[: len(cotangents)], gradients


@contextmanager
def _given(y: mx.array) -> Iterator[list[mx.array]]:
    """Let the part return `y`; yields a list that gets its input."""
    inputs: list[mx.array] = []

    def give(call: VisitedCall) -> mx.array:
        if inputs:
            raise RuntimeError("a block visits its MLP more than once")
        inputs.append(call.x)
        return y

    with handle_visits(give):
        yield inputs
