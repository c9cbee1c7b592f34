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
evaluated once.
"""

from collections.abc import Callable
from contextlib import ExitStack

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.attention import add_key_gradients, tracing_gradient
from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.checks import gradient_hook
from mlx_edgelora.blocks.experts import calls_experts, expert_adapters
from mlx_edgelora.blocks.masks import band_of
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.expert_gradients import vjp_by_experts
from mlx_edgelora.engine.functions import OutputRows, rows_of
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.layers.attention import KeySums
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
        block = context.functions.blocks.blocks[index]
        self._parts = BlockParts(block, call.args, call.kwargs, through_cache)
        self._input: Hidden | None = None
        self._places: list[mx.array | None] | None = None  # the wanted rows of each tile
        self._order: list[np.ndarray] = []  # their places among all wanted ones

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, x = self._context, self._context.store(x)
        self._find_places()
        trained, frozen = context.weights.load(self.index, next_block)
        out, pieces = Hidden.tiles(context.spans, context.slots), []
        with phase("forward", self.index), bind_arrays(self._slots, frozen | trained):
            key_values = self._key_values(x)
            for number, span in enumerate(context.spans):
                if self._places is not None and self._places[number] is None:
                    continue
                seen = self._parts.visible_keys(span, context.spans[-1].stop)
                tile = self._tile_output(x.tile(number), number, seen, _tokens(seen, key_values))
                context.pipeline.submit(tile)
                if self._places is None:
                    out.put(number, tile)
                else:
                    pieces.append(tile)
                del tile
        if self.index >= context.first:
            self._input = x
        else:
            x.forget()
        return out if self._places is None else Hidden(self._in_order(pieces))

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Gradients of the input and of the trained arrays; see `Segment`."""
        context, x, needs_input_grad = (
            self._context,
            self._input,
            self._context.needs_input_grad(self.index),
        )
        wanted = None if self._places is None else dy.whole()
        trained, frozen = context.weights.load(self.index, prefetch_next())
        visit = _TiledBackward(self, trained, needs_input_grad)
        dx = Hidden.tiles(context.spans, context.slots) if needs_input_grad else None
        with bind_arrays(self._slots, frozen | trained):
            with phase("recompute", self.index):
                visit.key_values = self._key_values(x)
            with phase("backward", self.index):
                for number in reversed(range(len(context.spans))):
                    if wanted is None:
                        cotangent = dy.tile(number)
                    elif self._places[number] is None:
                        cotangent = None
                    else:
                        cotangent = wanted[:, mx.array(self._order[number])]
                    piece = visit.tile(number, x.tile(number), cotangent)
                    del cotangent
                    if needs_input_grad:
                        dx.put(number, piece)
                    del piece
                if not self._is_causal:
                    for number in range(len(context.spans)):
                        piece = visit.finish_tile(
                            number, x.tile(number), dx.tile(number) if needs_input_grad else None
                        )
                        if needs_input_grad:
                            dx.put(number, piece)
        dy.forget()
        x.forget()
        return dx, visit.totals()

    def prefetch(self) -> None:
        """Read nothing: tiles are read when they are computed."""

    @property
    def _slots(self) -> dict:
        return self._context.weights.slots[self.index]

    @property
    def _is_causal(self) -> bool:
        """Whether the mask shows that no token sees a later one."""
        return band_of(self._parts.mask) is not None

    def _find_places(self) -> None:
        """Find the wanted rows of each tile."""
        if self._wanted.rows is None:
            return
        tokens = self._context.spans[-1].stop
        row, position = np.divmod(np.asarray(self._wanted.rows), tokens)
        self._places, self._order = [], []
        for span in self._context.spans:
            inside = np.flatnonzero((position >= span.start) & (position < span.stop))
            own = row[inside] * (span.stop - span.start) + position[inside] - span.start
            self._places.append(mx.array(own) if own.size else None)
            self._order.append(inside)

    def _in_order(self, pieces: list[mx.array]) -> mx.array:
        """Join the outputs of the tiles, [1, m, D] each, in the order of the wanted rows."""
        whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
        order = np.concatenate(self._order)
        if (np.diff(order) < 0).any():
            whole = whole[:, mx.array(np.argsort(order))]
        mx.eval(whole)
        return whole

    def _key_values(self, x: Hidden) -> list[mx.array]:
        """Keys and values of all tokens, [B, heads, T, n] each."""
        whole: list[mx.array] = []
        for number, span in enumerate(self._context.spans):
            pieces = self._parts.key_values(x.tile(number), span)
            if not whole:
                tokens = self._context.spans[-1].stop
                whole = [mx.zeros((*p.shape[:2], tokens, p.shape[3]), p.dtype) for p in pieces]
            for array, piece in zip(whole, pieces, strict=True):  # in place, not concatenated
                array[:, :, span.start : span.stop] = piece
            del pieces, piece
            mx.eval(whole)
        return whole

    def _tile_output(
        self, x: mx.array, number: int, seen: TokenSpan, key_values: list[mx.array]
    ) -> mx.array:
        """The block's output for a tile: [B, t, D], or [1, m, D] for its wanted rows."""
        span = self._context.spans[number]
        if self._places is None:
            return self._parts.output(x, span, seen, key_values)
        rows = self._places[number]
        if self._wanted.rows_only:
            return self._parts.output_at(x, span, seen, key_values, rows)
        return rows_of(self._parts.output(x, span, seen, key_values), rows)


class _TiledBackward:
    """One backward of a block whose arrays are bound: sums over its tiles.

    Attributes:
        key_values: keys and values of all tokens.
    """

    def __init__(self, block: TiledBlock, trained: Arrays, needs_input_grad: bool) -> None:
        self._block, self._trained, self._needs_input_grad = block, trained, needs_input_grad
        self._sums: Arrays = {}
        self._key_value_sums: KeySums | None = None
        module = block._context.functions.blocks.blocks[block.index]
        # Summed where they are made: in the graph each tile would have those of all experts.
        self._by_experts = calls_experts(module)
        self._of_experts = [name for name in expert_adapters(module) if name in trained]
        for name in self._of_experts:
            self._sums[name] = mx.zeros(trained[name].shape)
        mx.eval(self._sums)
        self.key_values: list[mx.array] = []

    def tile(self, number: int, x: mx.array, cotangent: mx.array | None) -> mx.array | None:
        """Differentiate a tile; returns the gradient of its input, if it is needed.

        Args:
            x: input [B, t, D].
            cotangent: gradient of the wanted rows of the tile's output; None if there are none.
        """
        block, spans = self._block, self._block._context.spans
        seen = block._parts.visible_keys(spans[number], spans[-1].stop)
        dx = None
        if cotangent is not None:

            def output(x: mx.array, *key_values: mx.array) -> list[mx.array]:
                return [block._tile_output(x, number, seen, list(key_values))]

            sums = self._sums_from(seen)
            with ExitStack() as stack:
                # Only attention reads these keys and values.
                if not block._parts.through_cache:
                    stack.enter_context(add_key_gradients(sums))
                dx, *pair = self._vjp(output, [x, *_tokens(seen, self.key_values)], [cotangent])
            if not sums.used:
                for index, more in enumerate(pair):
                    sums.add(index, more.reshape(-1, *more.shape[2:]), 0)
        elif self._needs_input_grad:
            dx = mx.zeros_like(x)
        if block._is_causal:
            return self.finish_tile(number, x, dx)
        self._settle(dx)
        return dx

    def finish_tile(self, number: int, x: mx.array, dx: mx.array | None) -> mx.array | None:
        """Add the gradient through a tile's own keys and values, which is complete now."""
        block = self._block
        span = block._context.spans[number]
        if self._key_value_sums is not None:
            cotangents = [
                total.astype(key_values.dtype)
                for total, key_values in zip(
                    _tokens(span, self._key_value_sums.arrays),
                    _tokens(span, self.key_values),
                    strict=True,
                )
            ]
            (more,) = self._vjp(lambda x: block._parts.key_values(x, span), [x], cotangents)
            dx = dx + more if self._needs_input_grad else None
        self._settle(dx)
        return dx

    def totals(self) -> Arrays:
        """Gradients of all trained arrays; zeros for those that no gradient reached."""
        found = {n: self._sums.get(n, mx.zeros_like(v)) for n, v in self._trained.items()}
        found = {name: value.astype(self._trained[name].dtype) for name, value in found.items()}
        mx.eval(found)
        return found

    def _settle(self, dx: mx.array | None) -> None:
        key_values = self._key_value_sums.arrays if self._key_value_sums else []
        arrays = dx if self._needs_input_grad else [], self._sums, key_values
        self._block._context.pipeline.submit(*arrays)

    def _sums_from(self, seen: TokenSpan) -> KeySums:
        """The sums of the gradients of keys and values, for a tile that sees these tokens."""
        if self._key_value_sums is None:
            (batch, heads, tokens, size), other = (
                self.key_values[0].shape,
                self.key_values[1].shape[-1],
            )
            self._key_value_sums = KeySums(batch, heads, tokens, (size, other))
        self._key_value_sums.start, self._key_value_sums.used = seen.start, False
        return self._key_value_sums

    def _vjp(
        self,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        cotangents: list[mx.array],
    ) -> list[mx.array]:
        """Differentiate a part of the block: return gradients of its inputs, sum the others."""
        trained = {n: v for n, v in self._trained.items() if n not in self._of_experts}
        of_experts = {id(self._trained[name]): self._sums[name] for name in self._of_experts}
        reached, count = set(), len(trained)

        def bound_function(*primals: mx.array) -> list[mx.array]:
            seen = {
                name: gradient_hook(lambda name=name: reached.add(name))(value)
                for name, value in zip(trained, primals[:count], strict=True)
            }
            with tracing_gradient(), bind_arrays(self._block._slots, seen):
                return function(*primals[count:])

        primals = [*trained.values(), *inputs]
        if self._by_experts:
            _, found = vjp_by_experts(bound_function, primals, cotangents, of_experts)
        else:
            _, found = mx.vjp(bound_function, primals, cotangents)
        # Arrays that a part does not use have zero gradients, which are not evaluated or added.
        # The values of a tile may decide which arrays these are (experts).
        for name, value in zip(trained, found, strict=False):
            if name in reached:
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        return found[count:]


def _tokens(span: TokenSpan, arrays: list[mx.array]) -> list[mx.array]:
    """The tokens of a span, of arrays [B, heads, T, n]."""
    return [array[:, :, span.start : span.stop] for array in arrays]
