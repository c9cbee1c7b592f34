"""The last blocks and the loss as one function of plain autodiff: nothing is recomputed.

The backward needs these blocks first, so their activations are kept for the shortest time. If all
blocks are in the tail, a step is plain backpropagation, compiled as one function.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_edgelora.blocks.attention import tracing_gradient
from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.functions import OutputRows, pack_arguments, unpack_arguments
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.measure.profile import phase


class GraphLoss(Protocol):
    """A loss that is part of the graph of the last blocks.

    Attributes:
        key: equal for losses that compute the same from their arguments; None for a loss that
            cannot be compiled.
        arrays: arguments of `graph`.
        outside: trained parameters outside the blocks, by name.
    """

    key: Hashable
    arrays: Sequence[mx.array]
    outside: Arrays

    def graph(self, hidden: mx.array, outside: Arrays, *arrays: mx.array) -> mx.array | tuple:
        """The loss of hidden states [B, T, D] or [1, n, D], or a tuple whose first item it is."""
        ...


class TailResult(NamedTuple):
    """The result of a tail, evaluated.

    Attributes:
        value: result of `GraphLoss.graph`.
        outside: gradients of `GraphLoss.outside`.
        by_block: index of each block and its gradients by local name, the last block first.
        dx: gradient of the tail's input, if it is needed.
    """

    value: mx.array | tuple
    outside: Arrays
    by_block: Iterator[tuple[int, Arrays]]
    dx: mx.array | None


class Tail:
    """The last blocks, whose activations are kept.

    Args:
        context: shared by the segments of a pass.
        indices: indices of the blocks.
        calls: arguments of the blocks.
        wanted: rows of the last block's output that are needed.
    """

    def __init__(
        self, context: Context, indices: range, calls: Sequence[BlockCall], wanted: OutputRows
    ) -> None:
        self._context, self._indices, self._calls, self._wanted = context, indices, calls, wanted

    def value_and_grad(self, x: Hidden, loss: GraphLoss) -> TailResult:
        """Compute the blocks and the loss, forward and backward; `x` is consumed."""
        context, indices, wanted = self._context, self._indices, self._wanted
        functions, needs_input_grad = (
            context.functions,
            context.needs_input_grad(self._indices.start),
        )
        calls = list(map(pack_arguments, self._calls))
        links = [call.links for call in self._calls]
        # What blocks of the tail read of blocks below it.
        below = list(dict.fromkeys(k for own in links for k in own if k.source < indices.start))
        # A compiled function keeps the objects that it captures, so it captures no arrays.
        graph, rows_only = loss.graph, wanted.rows_only

        def function(
            trained: list[Arrays],
            outside: Arrays,
            inputs: list[mx.array],
            frozen: list[Arrays],
            calls: list[tuple[tuple, dict]],
            rows: mx.array | None,
            arrays: list[mx.array],
        ) -> tuple:
            def forward(
                trained: list[Arrays], outside: Arrays, inputs: list[mx.array]
            ) -> mx.array | tuple:
                out, *shared = inputs
                known = dict(zip(below, shared, strict=True))
                blocks = zip(indices, trained, frozen, calls, links, strict=True)
                for index, own, others, call, reads in blocks:
                    args, kwargs = unpack_arguments(*call, [known[link] for link in reads])
                    part = OutputRows(rows, rows_only) if index == indices[-1] else OutputRows()
                    with (
                        tracing_gradient(),
                        bind_arrays(context.weights.slots[index], others | own),
                    ):
                        out, *read = functions.call_block(index, out, args, kwargs, part)
                    known |= zip(context.shared.links(index), read, strict=True)
                return graph(out, outside, *arrays)

            which = (0, 1, 2) if needs_input_grad else (0, 1)
            return mx.value_and_grad(forward, argnums=which)(trained, outside, inputs)

        loaded = [context.weights.load(index, own_memory=True) for index in indices]
        trained, frozen = ([pair[i] for pair in loaded] for i in (0, 1))
        del loaded
        key = loss.key
        if key is not None:
            kinds = tuple(map(functions.signature, indices))
            kinds = kinds, tuple(map(tuple, links))
            key = "tail", indices, kinds, needs_input_grad, wanted.rows is None, rows_only, loss.key
        if functions.tape.is_used:  # keys are drawn while the graph is built
            key = None
        with phase("backward", indices.start):
            inputs = [x.whole(), *context.shared.take(below)]
            x.forget()
            arguments = inputs, frozen, calls, wanted.rows, list(loss.arrays)
            value, found = functions.functions.call(
                key, function, trained, loss.outside, *arguments
            )
            del arguments, inputs, frozen, trained
            by_block, outside, *of_inputs = found
            del found
            mx.eval(value, of_inputs, by_block, outside)
        pairs = zip(reversed(indices), by_block[::-1], strict=True)
        dx = None
        if of_inputs:
            dx, *more = of_inputs[0]
            context.shared.add(below, more)
        return TailResult(value, outside, pairs, dx)
