"""The gradient of a block with a part that is visited, in segments that are not traced together.

    y = part(x)                     # the block's own code up to the part, then this one
    dy = (block after the part)'    # with y as an input
    dx = part'(dy)                  # piece by piece, not traced
    block'                          # with y as an input, and x and dx as an output

The part is a gated MLP that is read by rows (`blocks/visits.py`). What comes before it is computed
three times in place of once, and differentiated once. It is not in memory while the part is
computed.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_edgelora.blocks.visits import VISITS

Function = Callable[..., list[mx.array]]


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
        RuntimeError: the part is called more than once.
    """
    call = VISITS.first(lambda: function(*primals))
    if call is None:
        return mx.vjp(function, primals, cotangents)
    mx.eval(call.inputs())
    y = call.forward()

    def after(y: mx.array) -> list[mx.array]:
        with VISITS.given(lambda _: y):
            return function(*primals)

    # The outputs are not kept: they hold what was computed for the gradient.
    (dy,) = mx.vjp(after, [y], cotangents)[1]
    mx.eval(dy)
    own = {name: sums[id(array)] for name, array in call.adapters.items()}
    dx = call.backward(dy, own)
    del dy, call

    def both(*primals: mx.array) -> list[mx.array]:
        with VISITS.given(lambda _: y) as calls:
            return [*function(*primals), *(call.x for call in calls)]

    outputs, gradients = mx.vjp(both, primals, [*cotangents, dx])
    return outputs[: len(cotangents)], gradients
