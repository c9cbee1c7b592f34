"""A block that is computed for all tokens at once and recomputed in the backward (1604.06174)."""

from collections.abc import Callable

from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.functions import OutputRows
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.measure.profile import phase


class WholeBlock:
    """One block. Memory: its graph; between forward and backward only its input, in the store.

    Args:
        context: shared by the segments of a pass.
        index: index of the block.
        call: arguments of the block.
        wanted: rows of its output that are needed.
    """

    def __init__(self, context: Context, index: int, call: BlockCall, wanted: OutputRows) -> None:
        self._context, self.index, self._call, self._wanted = context, index, call, wanted
        self._input: Hidden | None = None

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, array = self._context, x.whole()
        if self.index < context.first:
            x.forget()
        arrays = context.weights.load(self.index, next_block)
        inputs = [array, *context.shared.take(self._call.links)]
        with phase("forward", self.index):
            out, *read = context.functions.forward(
                self.index, arrays, inputs, self._call, self._wanted
            )
            del arrays, array, inputs
            context.pipeline.submit(out, read)
            context.shared.put(self.index, read)
            del read
        if self.index >= context.first:  # after the computation, because a file needs the values
            self._input = context.store(x)
        return Hidden(out) if self._wanted.rows is not None else context.to_next_segment(out)

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Gradients of the input and of the trained arrays; see `Segment`."""
        context, cotangent = self._context, dy.whole()
        dy.forget()
        x, needs_input_grad = self._input.whole(), context.needs_input_grad(self.index)
        self._input.forget()
        arrays = context.weights.load(self.index, prefetch_next())
        links = self._call.links
        inputs = [x, *context.shared.take(links)]
        cotangents = [cotangent, *context.shared.cotangents(self.index)]
        with phase("backward", self.index):
            _, gradients, found = context.functions.gradients(
                self.index, arrays, inputs, cotangents, self._call, self._wanted, needs_input_grad
            )
            del arrays, x, cotangent, inputs, cotangents
            context.pipeline.submit(gradients, found)
        context.shared.forget(self.index)
        if not needs_input_grad:
            return None, gradients
        dx, *more = found
        context.shared.add(links, more)
        del found, more
        return context.to_next_segment(dx), gradients

    def prefetch(self) -> int:
        """Start reading the input; see `Segment`."""
        self._input.prefetch()
        return self.index
