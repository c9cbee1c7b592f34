"""One block by tiles of tokens that append to its caches, however many it has.

A tile is a function of its tokens and of what the tokens before appended, and gives what it appends
itself, as mlx-lm's chunked prefill calls a block (`blocks/cached_parts.py`):

    y, c = block(x, C);    dx, dW, dC = block'(x, C; dy, dc)

with C the arrays of all earlier tokens. The forward keeps nothing but the input, in the store. The
backward computes C again and goes from the last tile to the first: when a tile is reached, all
later ones have added to the gradient dc of what it appended. Memory: C and its float32 gradient,
for all tokens, C once more as the tile joins it to its own, and one tile's graph. Time: that of a
whole block, and one more forward up to the last cache.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx

from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.cached_parts import CachedParts
from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.expert_gradients import ExpertTiles
from mlx_edgelora.engine.expert_tiles import expert_tiles, given_experts
from mlx_edgelora.engine.functions import OutputRows
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.engine.tiled_backward import TiledBackward
from mlx_edgelora.engine.wanted import WantedRows
from mlx_edgelora.measure.profile import phase


class CachedBlock:
    """One block. Memory: see the module.

    Args:
        context: shared by the segments of a pass.
        index: index of the block.
        call: arguments of the block.
        wanted: rows of its output that are needed; all are computed.
        count: number of arrays that a tile appends.
    """

    def __init__(
        self, context: Context, index: int, call: BlockCall, wanted: OutputRows, count: int
    ) -> None:
        self._context, self.index, self._count = context, index, count
        function = context.functions.blocks.function(index)
        self._parts = CachedParts(function, call.args, call.kwargs)
        self._rows = WantedRows(wanted.rows, context.spans)
        self._input: Hidden | None = None

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, x = self._context, self._context.store(x)
        trained, frozen = context.weights.load(self.index, next_block)
        out, pieces = Hidden.tiles(context.spans, context.slots), []
        held: list[mx.array] = []
        with phase("forward", self.index), bind_arrays(self.slots, frozen | trained):
            experts = self._experts(x)
            if experts is not None:
                self._begin_experts(experts, x)
                experts.compute()
            for number, span in enumerate(context.spans):
                with given_experts(experts, number):
                    tile, own = self._parts.tile(x.tile(number), span, self._before(held, number))
                tile = self._rows.of_tile(tile, number) if self._rows.has(number) else None
                context.pipeline.submit([] if tile is None else tile, own)
                self._append(held, own, number)
                if self._rows.all:
                    out.put(number, tile)
                elif tile is not None:
                    pieces.append(tile)
                del tile, own
            if experts is not None:
                experts.forget()
        if self.index >= context.first:
            self._input = x
        else:
            x.forget()
        return out if self._rows.all else Hidden(self._rows.in_order(pieces))

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Gradients of the input and of the trained arrays; see `Segment`."""
        context, x = self._context, self._input
        dy = self._rows.by_tiles(dy, context.slots)
        trained, frozen = context.weights.load(self.index, prefetch_next())
        visit = TiledBackward(self, trained)
        needs_input_grad = context.needs_input_grad(self.index)
        dx = Hidden.tiles(context.spans, context.slots) if needs_input_grad else None
        with bind_arrays(self.slots, frozen | trained):
            visit.experts = self._experts(x)
            with phase("recompute", self.index):
                held = self._appended(x, visit.experts)
            sums = [mx.zeros(array.shape) for array in held]
            with phase("backward", self.index):
                visit.run_experts(lambda: self._expert_parts(x, held, dy))
                for number in reversed(range(len(context.spans))):
                    cotangent = self._rows.cotangent(dy, number)
                    piece = self._tile_backward(
                        visit, number, x.tile(number), cotangent, held, sums
                    )
                    if dx is not None:
                        dx.put(number, piece)
                    del piece, cotangent
        dy.forget()
        x.forget()
        return dx, visit.totals()

    def prefetch(self) -> int:
        """The block whose weights are read next: its tiles are read when they are computed."""
        return self.index

    @property
    def slots(self) -> dict:
        """The places of the block's arrays."""
        return self._context.weights.slots[self.index]

    def _tile_backward(
        self,
        visit: TiledBackward,
        number: int,
        x: mx.array,
        cotangent: mx.array | None,
        held: list[mx.array],
        sums: list[mx.array],
    ) -> mx.array:
        """The gradient of a tile's input; adds to the gradients `sums` of what is appended.

        Args:
            x: the input [B, t, D].
            cotangent: gradient of the wanted rows of its output; None if there are none.
            held: what all tiles appended.
        """
        span = self._context.spans[number]
        given = [
            total[:, :, span.start : span.stop].astype(array.dtype)
            for total, array in zip(sums, held, strict=True)
        ]
        before = self._before(held, number)

        def outputs(x: mx.array, *before: mx.array) -> list[mx.array]:
            if cotangent is None:
                return self._parts.appended(x, span, before, self._count)
            out, own = self._parts.tile(x, span, before)
            return [self._rows.of_tile(out, number), *own]

        wanted = [] if cotangent is None else [cotangent]
        piece, *found = visit.vjp(outputs, [x, *before], [*wanted, *given], number)
        for total, more in zip(sums, found, strict=bool(found)):
            total[:, :, : span.start] = total[:, :, : span.start] + more.astype(mx.float32)
        del found, given
        visit.submit(piece, sums)
        return piece

    def _experts(self, x: Hidden) -> ExpertTiles | None:
        """The experts of all tiles; None if each tile computes its own, or there are none."""
        mine, span = x.tile(0), self._context.spans[0]
        return expert_tiles(self._context, self.index, lambda: self._parts.tile(mine, span, [])[1])

    def _begin_experts(self, experts: ExpertTiles, x: Hidden) -> None:
        """Begin the forward of all tiles with outputs that are wanted."""
        held: list[mx.array] = []
        for number, span in enumerate(self._context.spans):
            begun = experts.beginning if self._rows.has(number) else experts.given
            with begun(number):
                _, own = self._parts.tile(x.tile(number), span, self._before(held, number))
            self._append(held, own, number)

    def _expert_parts(self, x: Hidden, held: list[mx.array], dy: Hidden) -> Iterator[tuple]:
        """What `TiledBackward.run_experts` needs of each tile with a gradient."""
        for number, span in enumerate(self._context.spans):
            if (cotangent := self._rows.cotangent(dy, number)) is None:
                continue

            def outputs(
                x: mx.array, *before: mx.array, number: int = number, span: TokenSpan = span
            ) -> list[mx.array]:
                return [self._rows.of_tile(self._parts.tile(x, span, before)[0], number)]

            yield number, outputs, [x.tile(number), *self._before(held, number)], [cotangent]

    def _appended(self, x: Hidden, experts: ExpertTiles | None) -> list[mx.array]:
        """What all tiles append."""
        held: list[mx.array] = []
        for number, span in enumerate(self._context.spans):
            before = self._before(held, number)
            with given_experts(experts, number):  # not begun: zeros
                own = self._parts.appended(x.tile(number), span, before, self._count)
            self._append(held, own, number)
        return held

    def _before(self, held: list[mx.array], number: int) -> list[mx.array]:
        """What the tiles before one appended."""
        start = self._context.spans[number].start
        return [array[:, :, :start] for array in held] if start else []

    def _append(self, held: list[mx.array], own: list[mx.array], number: int) -> None:
        """Write what a tile appends into the arrays of all tokens, in place."""
        span, tokens = self._context.spans[number], self._context.spans[-1].stop
        if not held:
            held += [mx.zeros((*a.shape[:2], tokens, a.shape[3]), a.dtype) for a in own]
        for array, piece in zip(held, own, strict=True):
            array[:, :, span.start : span.stop] = piece
        mx.eval(held)
