"""A recurrent or convolutional block, a tile of tokens at a time.

A tile is a function of its tokens and of the states after the tokens before, and gives both:

    y, s' = block(x, s);    dx, dW, ds = block'(x, s; dy, ds')

as mlx-lm's chunked prefill calls a block, with a stand-in for its cache (`blocks/states.py`). The
forward keeps nothing but the input, in the store. The backward computes the states again, from the
first tile on, puts them into the store as well, and goes from the last tile to the first with the
gradient of its states. A block
that has attention as well is given the keys and values of the tokens so far, as in
`tiled_block.py`: `K, V = key_values(x, s)`, whose gradient is complete when its tile is reached.

Memory: keys and values, and one tile's graph and states. Time: that of a whole
block and one more forward. Blocks whose tokens know nothing of each other have no states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_edgelora.blocks.attention import add_key_gradients
from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.blocks.states import Recurrence, RecurrentParts
from mlx_edgelora.blocks.visits import VISITS, VisitedCall, has_visits
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.expert_gradients import ExpertTiles
from mlx_edgelora.engine.expert_tiles import expert_tiles, given_experts
from mlx_edgelora.engine.functions import OutputRows
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.engine.spilled import SpilledArrays
from mlx_edgelora.engine.tiled_backward import TiledBackward, tokens_of_keys
from mlx_edgelora.engine.wanted import WantedRows
from mlx_edgelora.layers.attention import KeySums
from mlx_edgelora.measure.profile import phase


class RecurrentBlock:
    """One block. Memory: see the module.

    Args:
        context: shared by the segments of a pass.
        index: index of the block.
        call: arguments of the block.
        wanted: rows of its output that are needed; all are computed.
        recurrence: how the block is called for tiles.
    """

    def __init__(
        self,
        context: Context,
        index: int,
        call: BlockCall,
        wanted: OutputRows,
        recurrence: Recurrence,
    ) -> None:
        self._context, self.index, self._links = context, index, call.links
        blocks = context.functions.blocks
        self._parts = RecurrentParts(
            blocks.function(index), call.args, call.kwargs, blocks.forms[index], recurrence
        )
        self._rows = WantedRows(wanted.rows, context.spans)
        self._has_visits = has_visits(blocks.blocks[index])
        self._input: Hidden | None = None

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """The block's output; see `Segment`."""
        context, x = self._context, self._context.store(x)
        trained, frozen = context.weights.load(self.index, next_block)
        out, pieces = Hidden.tiles(context.spans, context.slots), []
        states, key_values = self._parts.no_states, []
        with phase("forward", self.index), bind_arrays(self.slots, frozen | trained):
            experts = self._experts(x)
            if experts is not None:
                self._begin_experts(experts, x)
                experts.compute()
            for number in range(len(context.spans)):
                mine, shared = x.tile(number), self._shared(number)
                self._add_key_values(key_values, mine, number, states, shared)
                with given_experts(experts, number):
                    made, states = self._outputs(mine, number, states, key_values, shared)
                tile, *read = made if self._rows.has(number) else [None, *made]
                context.pipeline.submit([] if tile is None else tile, read, states)
                context.shared.put_tile(self.index, number, read)
                if self._rows.all:
                    out.put(number, tile)
                elif tile is not None:
                    pieces.append(tile)
                del mine, made, tile, read, shared
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
                before = self._states(x, visit.key_values, visit.experts)
            with phase("backward", self.index):
                visit.run_experts(lambda: self._expert_parts(visit, x, before, dy))
                after: list[mx.array] = []
                for number in reversed(range(len(context.spans))):
                    cotangent = self._rows.cotangent(dy, number)
                    cotangents = [] if cotangent is None else [cotangent]
                    del cotangent
                    states = before[number].arrays() if number else self._parts.no_states
                    inputs = x.tile(number), self._shared(number), states
                    after = self._tile_backward(visit, number, inputs, cotangents, after, dx)
                    del inputs, cotangents, states
        for spilled in before.values():
            spilled.forget()
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

    def _shared(self, number: int) -> list[mx.array]:
        """A tile of what the block reads of earlier ones."""
        return self._context.shared.tile(self._links, number)

    def _seen(self, number: int) -> TokenSpan:
        spans = self._context.spans
        return self._parts.visible_keys(spans[number], spans[-1].stop)

    def _outputs(
        self,
        x: mx.array,
        number: int,
        states: list[mx.array | None],
        key_values: list[mx.array],
        shared: list[mx.array],
        cut: bool = True,
    ) -> tuple[list[mx.array], list[mx.array]]:
        """The wanted output of a tile, if any, with what later blocks read; the next states.

        `key_values` are those of all tokens if they are to be `cut`, else those that it sees.
        """
        seen = self._seen(number)
        visible = tokens_of_keys(seen, key_values) if cut else key_values
        (out, *read), states = self._parts.tile_outputs(
            x, self._context.spans[number], states, seen, visible, shared
        )
        if not self._rows.has(number):
            return read, states
        return [self._rows.of_tile(out, number), *read], states

    def _add_key_values(
        self,
        whole: list[mx.array],
        x: mx.array,
        number: int,
        states: list[mx.array | None],
        shared: list[mx.array],
    ) -> None:
        """Write the keys and values of a tile, if there are any, into those of all tokens."""
        if not self._parts.attends:
            return
        spans = self._context.spans
        pieces = self._parts.tile_key_values(x, spans[number], states, shared)
        if not whole:
            tokens = spans[-1].stop
            whole += [mx.zeros((*p.shape[:2], tokens, p.shape[3]), p.dtype) for p in pieces]
        for array, piece in zip(whole, pieces, strict=True):  # in place, not concatenated
            array[:, :, spans[number].start : spans[number].stop] = piece
        del pieces, piece
        mx.eval(whole)

    def _experts(self, x: Hidden) -> ExpertTiles | None:
        """The experts of all tiles; None if each tile computes its own, or there are none."""
        mine, shared, key_values = x.tile(0), self._shared(0), []

        def states() -> list[mx.array]:
            self._add_key_values(key_values, mine, 0, self._parts.no_states, shared)
            made = self._outputs(mine, 0, self._parts.no_states, key_values, shared)
            return [*made[0][self._rows.has(0) :], *made[1]]

        return expert_tiles(self._context, self.index, states)

    def _begin_experts(self, experts: ExpertTiles, x: Hidden) -> None:
        """Begin the forward of all tiles with outputs that are wanted."""
        states, key_values = self._parts.no_states, []
        for number in range(len(self._context.spans)):
            mine, shared = x.tile(number), self._shared(number)
            self._add_key_values(key_values, mine, number, states, shared)
            begun = experts.beginning if self._rows.has(number) else experts.given
            with begun(number):
                states = self._outputs(mine, number, states, key_values, shared)[1]
            mx.eval(states)

    def _expert_parts(
        self,
        visit: TiledBackward,
        x: Hidden,
        before: dict[int, SpilledArrays],
        dy: Hidden,
    ) -> Iterator[tuple]:
        """What `TiledBackward.run_experts` needs of each tile with a gradient."""
        for number in range(len(self._context.spans)):
            if (cotangent := self._rows.cotangent(dy, number)) is None:
                continue
            states = before[number].arrays() if number else []
            key_values = tokens_of_keys(self._seen(number), visit.key_values)
            primals = [x.tile(number), *self._shared(number), *states]

            def outputs(
                *inputs: mx.array,
                number: int = number,
                states: int = len(states),
                key_values: list[mx.array] = key_values,
            ) -> list[mx.array]:
                mine, shared, before = self._cut(inputs, states)
                return self._outputs(mine, number, before, key_values, shared, cut=False)[0][:1]

            with self._adding(visit, number):
                yield number, outputs, primals, [cotangent]

    @contextmanager
    def _adding(self, visit: TiledBackward, number: int) -> Iterator[KeySums | None]:
        """Let attention add the gradients of keys and values to their sums, if there are any."""
        if not visit.key_values:
            yield None
            return
        sums = visit.sums_from(self._seen(number))
        with add_key_gradients(sums):
            yield sums

    def _states(
        self, x: Hidden, key_values: list[mx.array], experts: ExpertTiles | None
    ) -> dict[int, SpilledArrays]:
        """The states before each tile but the first; fills the keys and values of all tokens."""
        found: dict[int, SpilledArrays] = {}
        states, count = self._parts.no_states, len(self._context.spans)
        for number in range(count):
            mine, shared = x.tile(number), self._shared(number)
            self._add_key_values(key_values, mine, number, states, shared)
            if number + 1 < count:
                part = mine, number, states, key_values, shared
                with given_experts(experts, number):  # not begun: zeros
                    states = self._states_alone(part)
                mx.eval(states)
                found[number + 1] = SpilledArrays(self._context.slots, states)
            del mine, shared
        return found

    def _states_alone(self, part: tuple) -> list[mx.array]:
        """The states that `_outputs` gives, if possible without experts and MLPs that are visited.

        They return NaN, which is in the states if these depend on them.
        """
        with VISITS.handled_by(_unknown):
            states = self._outputs(*part)[1]
        if self._has_visits and any(mx.isnan(state).any().item() for state in states):
            states = self._outputs(*part)[1]
        return states

    def _tile_backward(
        self,
        visit: TiledBackward,
        number: int,
        tile: tuple[mx.array, list[mx.array], list[mx.array | None]],
        cotangents: list[mx.array],
        after: list[mx.array],
        dx: Hidden | None,
    ) -> list[mx.array]:
        """Differentiate a tile; returns the gradients of the states before it.

        Args:
            tile: its input, what it reads of earlier blocks, and the states before it.
            cotangents: gradient of its wanted output, if there is one.
            after: gradients of the states after it; none for the last tile, which nothing reads.
        """
        context = self._context
        x, shared, before = tile
        given = [state for state in before if state is not None]  # none before the first tile
        primals, count = [x, *shared, *given], 1 + len(shared)
        cotangents = [*cotangents, *context.shared.cotangent_tile(self.index, number), *after]
        if cotangents:
            found = self._outputs_backward(visit, number, primals, len(given), cotangents)
        else:  # nothing reads anything of it
            found = [mx.zeros_like(array) for array in primals]
        if visit.key_value_sums is not None:
            more = self._key_values_backward(visit, number, primals, len(given))
            found = [a + b for a, b in zip(found, more, strict=True)]
        found = found if given or dx is not None else []
        sums = visit.key_value_sums.arrays if visit.key_value_sums else []
        visit.submit(found, sums)
        if visit.key_value_sums is not None:
            visit.key_value_sums.drop(context.spans[number].start)  # no earlier tile sees these
        if dx is not None:
            dx.put(number, found[0])
            context.shared.add_tile(self._links, number, found[1:count])
        return found[count:]

    def _outputs_backward(
        self,
        visit: TiledBackward,
        number: int,
        primals: list[mx.array],
        states: int,
        cotangents: list[mx.array],
    ) -> list[mx.array]:
        """Gradients of a tile's input, what it reads, and its states; adds those of K and V."""
        last, count = number + 1 == len(self._context.spans), len(primals)
        seen = self._seen(number)
        key_values = tokens_of_keys(seen, visit.key_values)

        def outputs(*inputs: mx.array) -> list[mx.array]:
            x, shared, before = self._cut(inputs[:count], states)
            some = list(inputs[count:])
            out, after = self._outputs(x, number, before, some, shared, cut=False)
            return out if last else [*out, *after]

        with self._adding(visit, number) as sums:
            found = visit.vjp(outputs, [*primals, *key_values], cotangents, number)
        if sums is not None and not sums.used:
            sums.add_whole(found[count:])
        return found[:count]

    def _key_values_backward(
        self, visit: TiledBackward, number: int, primals: list[mx.array], states: int
    ) -> list[mx.array]:
        """The gradients through a tile's own keys and values, which are complete now."""
        span = self._context.spans[number]
        cotangents = visit.sums_of(span)

        def key_values(*inputs: mx.array) -> list[mx.array]:
            x, shared, before = self._cut(inputs, states)
            return self._parts.tile_key_values(x, span, before, shared)

        return visit.vjp(key_values, primals, cotangents)

    def _cut(
        self, inputs: tuple[mx.array, ...], states: int
    ) -> tuple[mx.array, list[mx.array], list[mx.array | None]]:
        """The input of a tile, what it reads of earlier blocks, and the states before it."""
        end = len(inputs) - states
        return inputs[0], list(inputs[1:end]), list(inputs[end:]) or self._parts.no_states


def _unknown(call: VisitedCall) -> mx.array:
    return mx.full(call.out_shape, float("nan"), call.x.dtype)
