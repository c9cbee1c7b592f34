"""A recurrent or convolutional block, a tile of tokens at a time.

A tile is a function of its tokens and of the states after the tokens before, and gives both:

    y, s' = block(x, s);    dx, dW, ds = block'(x, s; dy, ds')

as mlx-lm's chunked prefill calls a block, with a stand-in for its cache (`blocks/parts.py`). The
forward keeps nothing but the input, in the store. The backward computes the states again, from the
first tile on, and goes from the last tile to the first with the gradient of its states. Memory: the
states before each tile, and one tile's graph. Time: that of a whole block and one more forward.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.parts import BlockParts
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.engine.tiled_block import TiledBackward
from mlx_edgelora.measure.profile import phase


class RecurrentBlock:
    """One block. Memory: see the module.

    Args:
        context: shared by the segments of a pass.
        index: index of the block.
        call: arguments of the block.
        states: number of its states.
    """

    def __init__(self, context: Context, index: int, call: BlockCall, states: int) -> None:
        self._context, self.index, self._none = context, index, [None] * states
        block = context.functions.blocks.function(index)
        self._parts = BlockParts(block, call.args, call.kwargs)
        self._input: Hidden | None = None

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, x = self._context, self._context.store(x)
        trained, frozen = context.weights.load(self.index, next_block)
        out, states = Hidden.tiles(context.spans, context.slots), self._none
        with phase("forward", self.index), bind_arrays(self.slots, frozen | trained):
            for number, span in enumerate(context.spans):
                tile, states = self._parts.output_and_states(x.tile(number), span, states)
                context.pipeline.submit(tile, *states)
                out.put(number, tile)
                del tile
        if self.index >= context.first:
            self._input = x
        else:
            x.forget()
        return out

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Gradients of the input and of the trained arrays; see `Segment`."""
        context, x = self._context, self._input
        needs_input_grad = context.needs_input_grad(self.index)
        trained, frozen = context.weights.load(self.index, prefetch_next())
        visit = TiledBackward(self, trained)
        dx = Hidden.tiles(context.spans, context.slots) if needs_input_grad else None
        with bind_arrays(self.slots, frozen | trained):
            with phase("recompute", self.index):
                states = self._states(x)
            with phase("backward", self.index):
                cotangents: list[mx.array] = []
                for number in reversed(range(len(context.spans))):
                    inputs = [x.tile(number), *states.pop()]
                    piece, *cotangents = visit.vjp(
                        self._tile(number), inputs, [dy.tile(number), *cotangents]
                    )
                    del inputs
                    visit.submit(piece if needs_input_grad else [], cotangents)
                    if needs_input_grad:
                        dx.put(number, piece)
                    del piece
        dy.forget()
        x.forget()
        return dx, visit.totals()

    def prefetch(self) -> None:
        """Read nothing: tiles are read when they are computed."""

    @property
    def slots(self) -> dict:
        """The places of the block's arrays."""
        return self._context.weights.slots[self.index]

    def _tile(self, number: int) -> Callable[..., list[mx.array]]:
        """The outputs of a tile that have a gradient: nothing reads the last tile's states."""
        span, last = self._context.spans[number], number + 1 == len(self._context.spans)

        def outputs(x: mx.array, *states: mx.array) -> list[mx.array]:
            before = list(states) or self._none  # none before the first tile
            out, states = self._parts.output_and_states(x, span, before)
            return [out] if last else [out, *states]

        return outputs

    def _states(self, x: Hidden) -> list[list[mx.array]]:
        """The states before each tile."""
        found: list[list[mx.array]] = [[]]
        for number, span in enumerate(self._context.spans[:-1]):
            before = found[-1] or self._none
            _, states = self._parts.output_and_states(x.tile(number), span, before)
            mx.eval(states)
            found.append(states)
        return found
