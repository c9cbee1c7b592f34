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

from mlx_edgelora.blocks.attention import add_key_gradients, tracing_gradient
from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.blocks.tracing import gradient_hook
from mlx_edgelora.blocks.visits import has_visits, visited_adapters
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.functions import OutputRows, rows_of
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.engine.visited_gradients import vjp_with_visits
from mlx_edgelora.engine.wanted import WantedRows
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
        out, pieces = Hidden.tiles(context.spans, context.slots), []
        with phase("forward", self.index), bind_arrays(self.slots, frozen | trained):
            key_values = self._key_values(x)
            for number, span in enumerate(context.spans):
                if not self._rows.has(number):
                    continue
                seen = self._parts.visible_keys(span, context.spans[-1].stop)
                own, shared = tokens_of_keys(seen, key_values), self._shared(number)
                tile, *read = self._tile_outputs(x.tile(number), number, seen, own, shared)
                context.pipeline.submit(tile, read)
                context.shared.put_tile(self.index, number, read)
                if self._rows.all:
                    out.put(number, tile)
                else:
                    pieces.append(tile)
                del tile, read, own, shared
        if self.index >= context.first:
            self._input = x
        else:
            x.forget()
        return out if self._rows.all else Hidden(self._rows.in_order(pieces))

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
        trained, frozen = context.weights.load(self.index, prefetch_next())
        visit = TiledBackward(self, trained)
        dx = Hidden.tiles(context.spans, context.slots) if needs_input_grad else None
        with bind_arrays(self.slots, frozen | trained):
            with phase("recompute", self.index):
                visit.key_values = self._key_values(x)
            with phase("backward", self.index):
                for number in reversed(range(len(context.spans))):
                    cotangent = self._rows.cotangent(dy, number)
                    visit.tile(number, x.tile(number), cotangent, dx)
                    del cotangent
                if not self._parts.is_causal:
                    for number in range(len(context.spans)):
                        visit.finish_tile(number, x.tile(number), dx)
        dy.forget()
        x.forget()
        context.shared.forget(self.index)
        return dx, visit.totals()

    def prefetch(self) -> None:
        """Read nothing: tiles are read when they are computed."""

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
            mx.eval(whole)
        return whole

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


class TiledBackward:
    """One backward of a block whose arrays are bound: sums over its tiles.

    Attributes:
        key_values: keys and values of all tokens.
    """

    def __init__(self, block: TiledBlock, trained: Arrays) -> None:
        self._block, self._trained = block, trained
        self._sums: Arrays = {}
        self.key_value_sums: KeySums | None = None
        module = block._context.functions.blocks.blocks[block.index]
        # Summed where they are made: in the graph each tile would have those of all experts.
        self._has_visits = has_visits(module)
        self._visited = [name for name in visited_adapters(module) if name in trained]
        for name in self._visited:
            self._sums[name] = mx.zeros(trained[name].shape)
        mx.eval(self._sums)
        self.key_values: list[mx.array] = []

    def tile(self, number: int, x: mx.array, cotangent: mx.array | None, dx: Hidden | None) -> None:
        """Differentiate a tile.

        Args:
            x: input [B, t, D].
            cotangent: gradient of the wanted rows of the tile's output; None if there are none.
            dx: where the gradient of the input is put; None if it is not needed.
        """
        block, spans, shared = self._block, self._block._context.spans, self._block._shared(number)
        seen = block._parts.visible_keys(spans[number], spans[-1].stop)
        found = [mx.zeros_like(array) for array in (x, *shared)]
        if cotangent is not None:

            def outputs(*inputs: mx.array) -> list[mx.array]:
                x, *others = inputs
                own, key_values = others[: len(shared)], others[len(shared) :]
                return block._tile_outputs(x, number, seen, key_values, own)

            sums = self.sums_from(seen)
            cotangents = [cotangent, *block._context.shared.cotangent_tile(block.index, number)]
            with ExitStack() as stack:
                # Only attention reads these keys and values.
                if not block._parts.through_cache:
                    stack.enter_context(add_key_gradients(sums))
                inputs = [x, *shared, *tokens_of_keys(seen, self.key_values)]
                found = self.vjp(outputs, inputs, cotangents)
            found, pair = found[: 1 + len(shared)], found[1 + len(shared) :]
            if not sums.used:
                sums.add_whole(pair)
        if block._parts.is_causal:
            found = self._with_own_keys(number, [x, *shared], found)
        self._settle(number, found, dx)

    def finish_tile(self, number: int, x: mx.array, dx: Hidden | None) -> None:
        """Add the gradient through a tile's own keys and values, which is complete now."""
        shared = self._block._shared(number)
        found = [mx.zeros_like(array) for array in (x, *shared)]
        if dx is not None:
            found[0] = dx.tile(number)
        self._settle(number, self._with_own_keys(number, [x, *shared], found), dx)

    def _with_own_keys(
        self, number: int, inputs: list[mx.array], found: list[mx.array]
    ) -> list[mx.array]:
        """Gradients of a tile's inputs, plus those through its own keys and values."""
        if self.key_value_sums is None:
            return found
        block = self._block
        span = block._context.spans[number]
        cotangents = self.sums_of(span)
        more = self.vjp(
            lambda x, *shared: block._parts.key_values(x, span, shared=shared), inputs, cotangents
        )
        return [a + b for a, b in zip(found, more, strict=True)]

    def totals(self) -> Arrays:
        """Gradients of all trained arrays; zeros for those that no gradient reached."""
        found = {n: self._sums.get(n, mx.zeros_like(v)) for n, v in self._trained.items()}
        found = {name: value.astype(self._trained[name].dtype) for name, value in found.items()}
        mx.eval(found)
        return found

    def submit(self, *arrays: object) -> None:
        """Compute these arrays and the sums so far."""
        self._block._context.pipeline.submit(*arrays, self._sums)

    def _settle(self, number: int, found: list[mx.array], dx: Hidden | None) -> None:
        """Evaluate and store the gradients of a tile's inputs, and the sums so far."""
        key_values = self.key_value_sums.arrays if self.key_value_sums else []
        own, *shared = found
        context = self._block._context
        context.pipeline.submit(found if dx is not None else [], self._sums, key_values)
        if dx is not None:
            dx.put(number, own)
            context.shared.add_tile(self._block._links, number, shared)
        if self.key_value_sums and self._block._parts.is_causal:
            self.key_value_sums.drop(context.spans[number].start)  # no earlier tile sees these

    def sums_from(self, seen: TokenSpan) -> KeySums:
        """The sums of the gradients of keys and values, for a tile that sees these tokens."""
        if self.key_value_sums is None:
            (batch, heads, _, size), other = self.key_values[0].shape, self.key_values[1].shape[-1]
            self.key_value_sums = KeySums(batch, heads, (size, other))
        self.key_value_sums.start, self.key_value_sums.used = seen.start, False
        return self.key_value_sums

    def sums_of(self, span: TokenSpan) -> list[mx.array]:
        """The gradients of a tile's own keys and values, in their dtypes."""
        totals = self.key_value_sums.tokens(span.start, span.stop)
        pairs = zip(totals, self.key_values, strict=True)
        return [total.astype(array.dtype) for total, array in pairs]

    def vjp(
        self,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        cotangents: list[mx.array],
    ) -> list[mx.array]:
        """Differentiate a part of the block: return gradients of its inputs, sum the others."""
        trained = {n: v for n, v in self._trained.items() if n not in self._visited}
        visited = {id(self._trained[name]): self._sums[name] for name in self._visited}
        reached, count = set(), len(trained)

        def bound_function(*primals: mx.array) -> list[mx.array]:
            seen = {
                name: gradient_hook(lambda name=name: reached.add(name))(value)
                for name, value in zip(trained, primals[:count], strict=True)
            }
            with tracing_gradient(), bind_arrays(self._block.slots, seen):
                return function(*primals[count:])

        primals = [*trained.values(), *inputs]
        if self._has_visits:
            _, found = vjp_with_visits(bound_function, primals, cotangents, visited)
        else:
            _, found = mx.vjp(bound_function, primals, cotangents)
        # Arrays that a part does not use have zero gradients, which are not evaluated or added.
        # The values of a tile may decide which arrays these are (experts).
        for name, value in zip(trained, found, strict=False):
            if name in reached:
                # In float32: trained weights may have 16 bits, and a row many tiles.
                before = self._sums.get(name)
                self._sums[name] = value if before is None else before.astype(mx.float32) + value
        return found[count:]


def tokens_of_keys(span: TokenSpan, arrays: list[mx.array]) -> list[mx.array]:
    """The tokens of a span, of arrays [B, heads, T, n]."""
    return [array[:, :, span.start : span.stop] for array in arrays]
