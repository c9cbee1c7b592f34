"""A block whose activations are kept: its backward graph waits for the gradient of its output."""

from collections.abc import Callable

from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.functions import OutputRows
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.measure.profile import phase
from mlx_edgelora.storage.deferred import DeferredArray


class KeptBlock:
    """One block that is not recomputed; the head is not a part of its graph.

    Memory, from forward to backward: the activations that autodiff keeps, and the weights.

    Args:
        context: shared by the segments of a pass.
        index: index of the block.
        call: arguments of the block.
        wanted: rows of its output that are needed.
    """

    def __init__(self, context: Context, index: int, call: BlockCall, wanted: OutputRows) -> None:
        self._context, self.index, self._call, self._wanted = context, index, call, wanted
        self._cotangents: list[DeferredArray] = []
        self._found: tuple = ()

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, array, rows = self._context, x.whole(), self._wanted.rows
        x.forget()
        arrays = context.weights.load(self.index, next_block, own_memory=True)
        with phase("forward", self.index):
            inputs = [array, *context.shared.take(self._call.links)]
            asked = self.index, arrays, inputs
            dtypes = context.functions.dtypes(*asked, self._call, self._wanted)
            shape = array.shape if rows is None else (1, rows.size, array.shape[-1])
            shapes = [shape, *context.shared.shapes(self.index)]
            self._cotangents = list(map(DeferredArray, shapes, dtypes))
            (out, *read), *self._found = context.functions.gradients(
                *asked,
                [deferred.array for deferred in self._cotangents],
                self._call,
                self._wanted,
                context.needs_input_grad(self.index),
                first=True,
            )
            del arrays, array, inputs, asked
            context.pipeline.submit(out, read)
            context.shared.put(self.index, read)
        return Hidden(out)

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Gradients of the input and of the trained arrays; see `Segment`."""
        context, cotangents = self._context, [dy.whole()]
        dy.forget()
        cotangents += context.shared.cotangents(self.index)
        context.weights.prefetch(prefetch_next())
        with phase("backward", self.index):
            for deferred, cotangent in zip(self._cotangents, cotangents, strict=True):
                deferred.fill(cotangent)
            del cotangents, cotangent
            (gradients, found), self._found = self._found, ()
            context.pipeline.submit(gradients, found)
        context.shared.forget(self.index)
        if not found:
            return None, gradients
        dx, *more = found
        context.shared.add(self._call.links, more)
        return Hidden(dx), gradients

    def prefetch(self) -> None:
        """Read nothing: everything is in memory."""
