"""One block forward and backward, a tile of tokens at a time: no array of tokens x hidden.

A tile is a span of tokens of every row of the batch. The forward computes the keys and values of
all tiles (or the inputs of the block's cache; `blocks/parts.py`), then the block's output for each
tile over the keys that its tokens see. The backward goes from the last tile to the first, with one
gradient of the block for each tile:

    dx, dW, dK, dV = block'(x, K, V; dy);    sum dK, dV over tiles

When dK and dV of a tile are complete (with a causal mask at once, because no earlier token sees
it), `dx += key_values'(x; dK, dV)`. Hidden states and their gradients are read from and written to
a store tile by tile. Memory: keys and values of all tokens, T (Dk + Dv), their float32 gradients
with the contribution of one tile, and one tile's graph. Time: that of a whole block, and the norm
and projections of keys and values once more in the forward and twice in the backward. Each tile is
evaluated once, in a block with experts twice (`expert_gradients.py`).
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.expert_gradients import ExpertTiles
from mlx_edgelora.engine.expert_tiles import expert_tiles, given_experts
from mlx_edgelora.engine.functions import OutputRows, rows_of
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.key_windows import KeyWindows
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.engine.tiled_backward import TiledBackward, tokens_of_keys
from mlx_edgelora.engine.wanted import WantedRows
from mlx_edgelora.measure.profile import phase


class TiledBlock:
    """One block. Memory: see the module.

    Args:
        context: shared by the segments of a pass.
        index: index of the block.
        call: arguments of the block.
        wanted: rows of its output that are needed.
        through_cache: see `BlockParts`.
    """

    def __init__(
        self, context: Context, index: int, call: BlockCall, wanted: OutputRows, through_cache: bool
    ) -> None:
        self._context, self.index, self._wanted = context, index, wanted
        self._rows = WantedRows(wanted.rows, context.spans)
        block = context.functions.blocks.function(index)
        form = context.functions.blocks.forms[index]
        self._parts = BlockParts(block, call.args, call.kwargs, through_cache, form)
        self._links = call.links
        self._input: Hidden | None = None

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, x = self._context, self._context.store(x)
        trained, frozen = context.weights.load(self.index, next_block)
        out = Hidden.tiles(context.spans, context.slots)
        with phase("forward", self.index), bind_arrays(self.slots, frozen | trained):
            key_values = self._key_values(x)
            experts = expert_tiles(context, self.index)
            wanted = filter(self._rows.has, range(len(context.spans)))
            outputs = partial(self._forward_tile, x, key_values)
            if experts is not None:
                wanted = list(wanted)
                for number in wanted:
                    experts.begin(number, partial(outputs, number))
                experts.compute()
            for number in wanted:
                tile, *read = outputs(number, experts)
                context.pipeline.submit(tile, read)
                context.shared.put_tile(self.index, number, read)
                out.put(number, tile)
                del tile, read
            if experts is not None:
                experts.forget()
        if self.index >= context.first:
            self._input = x
        else:
            x.forget()
        del outputs, key_values  # before the wanted rows come from the store
        return out if self._rows.all else self._rows.joined(out)

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Gradients of the input and of the trained arrays; see `Segment`."""
        context, x, needs_input_grad = (
            self._context,
            self._input,
            self._context.needs_input_grad(self.index),
        )
        dy = self._rows.by_tiles(dy, context.slots)
        cotangent_of = partial(self._rows.cotangent, dy)
        trained, frozen = context.weights.load(self.index, prefetch_next())
        visit = TiledBackward(self, trained)
        dx = Hidden.tiles(context.spans, context.slots) if needs_input_grad else None
        if context.key_tokens is not None and self._parts.is_causal:
            visit.key_windows = KeyWindows(context, self._parts, context.key_tokens)
        with bind_arrays(self.slots, frozen | trained):
            with phase("recompute", self.index):
                visit.key_values = self._key_values(x)
            with phase("backward", self.index):
                visit.compute_experts(x, cotangent_of)
                for number in reversed(range(len(context.spans))):
                    cotangent = cotangent_of(number)
                    visit.tile(number, x.tile(number), cotangent, dx)
                    del cotangent
                if not self._parts.is_causal:
                    for number in range(len(context.spans)):
                        visit.finish_tile(number, x.tile(number), dx)
        dy.forget()
        x.forget()
        context.shared.forget(self.index)
        return dx, visit.totals()

    def prefetch(self) -> int:
        """The block whose weights are read next: its tiles are read when they are computed."""
        return self.index

    @property
    def slots(self) -> dict:
        """The places of the block's arrays."""
        return self._context.weights.slots[self.index]

    def _key_values(self, x: Hidden) -> list[mx.array]:
        """Keys and values of all tokens, [B, heads, T, n] each."""
        whole: list[mx.array] = []
        for number, span in enumerate(self._context.spans):
            pieces = self._parts.key_values(x.tile(number), span, shared=self._shared(number))
            if not whole:
                tokens = self._context.spans[-1].stop
                whole = [mx.zeros((*p.shape[:2], tokens, p.shape[3]), p.dtype) for p in pieces]
            for array, piece in zip(whole, pieces, strict=True):  # in place, not concatenated
                array[:, :, span.start : span.stop] = piece
            del pieces, piece
            self._context.pipeline.submit(whole)
        return whole

    def _forward_tile(
        self, x: Hidden, key_values: list[mx.array], number: int, experts: ExpertTiles | None = None
    ) -> list[mx.array]:
        """The outputs of a tile, whose `experts` are computed if they are given."""
        spans = self._context.spans
        seen = self._parts.visible_keys(spans[number], spans[-1].stop)
        part = x.tile(number), number, seen, tokens_of_keys(seen, key_values), self._shared(number)
        with given_experts(experts, number):
            return self._tile_outputs(*part)

    def _shared(self, number: int) -> list[mx.array]:
        """A tile of what the block reads of earlier ones."""
        return self._context.shared.tile(self._links, number)

    def _tile_outputs(
        self,
        x: mx.array,
        number: int,
        seen: TokenSpan,
        key_values: list[mx.array],
        shared: list[mx.array],
    ) -> list[mx.array]:
        """The block's output for a tile, and what later blocks read of it.

        The output is [B, t, D], or [1, m, D] for the wanted rows of the tile.
        """
        part = x, self._context.spans[number], seen, key_values
        if self._rows.all:
            return self._parts.outputs(*part, shared)
        rows = self._rows.at(number)
        if self._wanted.rows_only:  # the last block, which none reads
            return [self._parts.output_at(*part, rows, shared)]
        out, *read = self._parts.outputs(*part, shared)
        return [rows_of(out, rows), *read]
