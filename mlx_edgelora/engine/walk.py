"""A step's gradients, walked in segments: memory does not grow with depth.

    calls = record(model)                        # the model's own loop, once
    for segment in segments: x = segment.forward(x)
    loss, dy = …                                 # the tail's, or the caller's
    for segment in reversed(segments): dy, gradients = segment.backward(dy)

The walk is not traced by MLX: an array that is evaluated while a gradient is traced keeps its whole
graph, so nothing would be freed. Each segment is differentiated separately and evaluated, and its
graph is dropped. A segment is a block computed whole (`WholeBlock`), by tiles of tokens
(`TiledBlock`, `RecurrentBlock`), or once with its activations kept (`KeptBlock`); the last blocks
and the loss can be one segment (`Tail`).
"""

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.attention import bounded_attention
from mlx_edgelora.blocks.block_list import BlockList, Slot, array_slots, bind_arrays
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.dropout import KeyTape, dropout_layers, keyed_dropout
from mlx_edgelora.blocks.gated_delta import chunked_gated_delta
from mlx_edgelora.blocks.norms import bounded_norms
from mlx_edgelora.blocks.packable import check_packing
from mlx_edgelora.blocks.packing import Packing, packing_now, rows_packed
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.blocks.state_space import chunked_state_space
from mlx_edgelora.blocks.states import states_in
from mlx_edgelora.blocks.tiling import Tileable, Tiling
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.engine.block_weights import Arrays, BlockWeights
from mlx_edgelora.engine.cached_block import CachedBlock
from mlx_edgelora.engine.context import Context, Segment
from mlx_edgelora.engine.expert_tiles import expert_slots
from mlx_edgelora.engine.functions import SAME_KEY, BlockFunctions, OutputRows
from mlx_edgelora.engine.hidden import Hidden, Slots, spans_of
from mlx_edgelora.engine.kept_block import KeptBlock
from mlx_edgelora.engine.key_windows import CALL_SLOTS
from mlx_edgelora.engine.pipeline import Pipeline
from mlx_edgelora.engine.record import BlockCall, first_input, record
from mlx_edgelora.engine.recurrent_block import RecurrentBlock
from mlx_edgelora.engine.shared import SharedOutputs
from mlx_edgelora.engine.spilled import slots_of
from mlx_edgelora.engine.tail import GraphLoss, Tail
from mlx_edgelora.engine.tiled_block import TiledBlock
from mlx_edgelora.engine.whole_block import WholeBlock
from mlx_edgelora.measure.meter import eval_without_run_ahead
from mlx_edgelora.measure.profile import phase
from mlx_edgelora.model.weights import ResidentWeights, StreamedWeights
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage.stores import ActivationStore, RamStore


@dataclass
class Pass:
    """One forward pass before its backward.

    Attributes:
        run: calls the model.
        context: shared by the segments.
        segments: the blocks below the tail.
        tail: the last blocks with the loss, not computed yet (`Walk.finish`); None if no block is
            kept, or nothing is differentiated.
        rows: rows of the last block's output that are needed; None for all.
        hidden: without a tail, the last block's output: [batch, tokens, hidden], or
            [1, n, hidden] for n rows. Set it to None after use, so that its memory is free during
            the backward.
        again: the last block's output inside the context `again` of `Walk.forward`.
        cotangent: gradient of the output of the segments; without a tail, set it before
            `Walk.backward`.
    """

    run: Callable[[], Any]
    context: Context
    segments: list[Segment]
    tail: Tail | None
    rows: mx.array | None = None
    hidden: mx.array | None = None
    again: mx.array | None = None
    cotangent: mx.array | None = None
    entry_keys: list[mx.array] | None = None
    below_tail: Hidden | None = None
    tail_gradients: Iterator[tuple[int, Arrays]] = field(default_factory=lambda: iter(()))


class Walk:
    """Walks one model forward and backward.

    Args:
        model: any mlx-lm model that `check_walk` accepts.
        store: keeps hidden states until the backward; in memory by default.
        weights: source of frozen weights; by default they are in the model.
        compiled: whether to compile one function per kind of segment instead of building each
            graph again. MLX then fuses more operations; on a CPU it calls a C++ compiler for every
            fused kernel, which takes seconds. Blocks whose control flow depends on values, and
            blocks with dropout, are not compiled.
        adapters: source of the blocks' trained parameters; by default they are in the model.
            Those outside the blocks always are.
        plan: how blocks are computed and where hidden states are kept: `prefetch`, `tile_tokens`,
            `kept_blocks` and `inputs`.
        pause: called after every block, forward and backward.
        blocks: the model's blocks, if they were checked already.
        like: a walk over a model that contains these blocks, whose results of tiling trials are
            reused.

    Attributes:
        ahead: whether to build a segment's graph while the previous segment is computed, if the
            plan also prefetches weights; on a GPU.
        pause: called after every block.
        sample: indices of the blocks to compute among those that are not kept; None for all. The
            last block must be one of them or kept. For measuring: the output is not the model's.

    Raises:
        EdgeLoraError: the architecture cannot be walked.
    """

    def __init__(
        self,
        model: nn.Module,
        store: ActivationStore | None = None,
        weights: WeightSource | None = None,
        compiled: bool = False,
        adapters: WeightSource | None = None,
        plan: Plan = Plan(),  # noqa: B008 - frozen
        pause: Callable[[], None] = lambda: None,
        blocks: BlockList | None = None,
        like: "Walk | None" = None,
    ) -> None:
        self.ahead = mx.default_device() == mx.gpu
        self.sample: Container[int] | None = None
        self.model, self.pause = model, pause
        self.blocks = blocks or checked_blocks(model)
        self.store = RamStore() if store is None else store
        self.weights = ResidentWeights() if weights is None else weights
        self.adapters = ResidentWeights() if adapters is None else adapters
        self._block_weights = BlockWeights(self.blocks, self.weights, self.adapters)
        self._tiling = Tiling(self.blocks, (self.weights, self.adapters), like and like._tiling)
        self._ram, self._dropout = RamStore(), dropout_layers(model)
        # The same tape for all passes, because compiled functions capture it.
        self._tape = KeyTape()
        self._functions = BlockFunctions(
            self.blocks, self._block_weights.slots, self._tape, compiled
        )
        self.refresh()
        self.set_plan(plan)

    def refresh(self) -> None:
        """Look up the trained parameters again."""
        self._block_weights.refresh()
        self._functions.slots = self._block_weights.slots
        self._functions.refresh()
        names = [name for name, _ in tree_flatten(self.model.trainable_parameters())]
        slots = array_slots(self.model)
        self._outside = {n: slots[n] for n in names if self.blocks.local(n) is None}
        self._reached: tuple[int, bool] | None = None

    def set_plan(self, plan: Plan) -> None:
        """Follow another plan in later passes."""
        self._plan = plan
        self._block_weights.prefetches = plan.prefetch
        self._functions.refresh()

    @property
    def _overlaps(self) -> bool:
        return self.ahead and (self._plan.prefetch or not self._plan.streams)

    @property
    def is_compiled(self) -> bool:
        """Whether functions are compiled."""
        return self._functions.functions.compiles

    @property
    def compiled_functions(self) -> int:
        """Number of compiled functions so far."""
        return len(self._functions.functions)

    @property
    def computes_rows_only(self) -> bool:
        """Whether the last block can be computed for some rows only."""
        return self._tiling.tileable(len(self.blocks) - 1).by_rows

    @property
    def tiling(self) -> str:
        """Describe which blocks are computed by tiles of tokens, and why others are not."""
        if self._plan.tile_tokens is None:
            return "none: all tokens at once"
        return f"{self._plan.tile_tokens} tokens at a time in {self._tiling.summary()}"

    def tile_choice(self, index: int, tokens: int) -> Tileable | None:
        """The tiling of a block for a batch with `tokens` tokens; None if it is not tiled."""
        return self._tiling.tileable(index) if self._cuts(tokens) else None

    def check_packing(self, tokens: int) -> None:
        """See that rows can share a row of so many tokens in this model.

        Raises:
            EdgeLoraError: they would mix; names the architecture, the block and the reason.
        """
        check_packing(self.blocks, (self.weights, self.adapters), self._tiling, tokens)

    def _cuts(self, tokens: int) -> bool:
        """Whether a batch with `tokens` tokens, over all rows, is computed by tiles."""
        return self._plan.tile_tokens is not None and tokens > self._plan.tile_tokens

    @contextmanager
    def forward(
        self,
        run: Callable[[], Any],
        keep: bool = True,
        rows: mx.array | None = None,
        packing: Packing | None = None,
        again: Callable[[], AbstractContextManager] | None = None,
    ) -> Iterator[Pass]:
        """Run the blocks; call `backward` inside the context.

        Args:
            run: calls the model, directly or inside a loss; stopped after its last block.
            keep: keep the blocks' inputs for a backward pass.
            rows: int [n], ascending: of the batch * tokens rows of the last block's output
                those that are needed. `hidden` and `cotangent` are then [1, n, hidden],
                and where it can be the last block is computed for these rows only.
            packing: where rows of the batch are shared by several, which must not mix.
            again: makes a context in which each block is computed a second time, from weights that
                are read once; not with `keep`.

        Raises:
            ValueError: rows are not ascending indices of the batch * tokens rows.
        """
        layers = keyed_dropout(self._dropout, self._tape)
        with (
            layers,
            bounded_attention(),
            bounded_norms(),
            chunked_gated_delta(),
            chunked_state_space(),
            rows_packed(packing),
        ):
            first, entry = self._lowest_reached(run) if keep else (len(self.blocks), False)
            with self._tape.recording() as entry_keys:
                x, calls = record(self.blocks, run)
            with phase("load"):
                eval_without_run_ahead(x)
            if rows is not None:
                check_row_indices(rows, x.shape[0] * x.shape[1])
            state = self._new_pass(run, x, calls, rows, first, entry, again is not None)
            state.entry_keys = entry_keys
            hidden, second = Hidden(x), None
            del x
            if again is not None:
                with self.inside(again):
                    second = Hidden(record(self.blocks, run)[0])
                    eval_without_run_ahead(second.whole())
            for number, segment in enumerate(state.segments):
                next_segments = state.segments[number + 1 : number + 2]
                next_block = next_segments[0].index if next_segments else None
                hidden = segment.forward(hidden, next_block)
                if second is not None:
                    with self.inside(again):
                        second = segment.forward(second, next_block)
                self.pause()
            state.context.pipeline.drain()
            if state.tail is None:
                state.hidden = hidden.whole()
                hidden.forget()
            else:
                state.below_tail = hidden
            if second is not None:
                state.again = second.whole()
                second.forget()
            del hidden, second
            yield state

    @contextmanager
    def inside(self, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """Enter a context that changes settings of blocks, by which functions are compiled."""
        self._functions.refresh()
        with context():
            yield
        self._functions.refresh()

    def _new_pass(
        self,
        run: Callable[[], Any],
        x: mx.array,
        calls: list[BlockCall],
        rows: mx.array | None,
        first: int,
        entry: bool,
        twice: bool,
    ) -> Pass:
        """Create a pass and its segments, without computing anything."""
        count, (batch, tokens, width) = len(self.blocks), x.shape
        kept_from, spans, slots = self._room(batch, tokens, width * x.dtype.size, first, twice)
        pipeline = Pipeline(self._overlaps)
        if isinstance(self.weights, StreamedWeights):
            self.weights.in_use = 2 if self._overlaps else 1
            self.weights.repeats = twice
        shared = SharedOutputs(self.blocks.forms, slots, spans, batch, first)
        context = Context(
            self._block_weights,
            self._functions,
            pipeline,
            slots,
            spans,
            first,
            entry,
            shared,
            self._plan.key_tokens if self._plan.spills else None,
        )
        if rows is not None and rows.size == batch * tokens:
            last = OutputRows(rows)  # all rows are needed
        else:
            rows_only = rows is not None and self.computes_rows_only
            last = OutputRows(rows, rows_only and self._can_cut(count - 1, calls[-1], tokens))
        segments: list[Segment] = []
        # A head that is read by tiles cannot be part of the kept blocks' graph.
        tail_from = count if self._plan.reads_head else kept_from
        for index in range(tail_from):
            if self.sample is not None and index < kept_from and index not in self.sample:
                continue
            wanted = last if index + 1 == count else OutputRows()
            choice = self._tiling.tileable(index) if len(spans) > 1 else None
            if index >= kept_from:
                segments.append(KeptBlock(context, index, calls[index], wanted))
            elif choice and choice.possible and self._can_cut(index, calls[index], tokens):
                segments.append(_tiled(context, index, calls[index], wanted, choice))
            else:
                segments.append(WholeBlock(context, index, calls[index], wanted))
        tail = None
        if tail_from < count:
            tail = Tail(context, range(tail_from, count), calls[tail_from:], last)
        return Pass(run, context, segments, tail, rows)

    def reserve(self, rows: int, tokens: int, nbytes: int) -> None:
        """Allocate the disk space for the largest batch, so that the file never grows later.

        Args:
            rows, tokens: shape of the batch.
            nbytes: bytes of a token's hidden state.

        Raises:
            EdgeLoraError: the volume is full, or cannot be used.
        """
        first = 0 if self._outside else self._block_weights.lowest_trained
        self._room(rows, tokens, nbytes, first)

    def _room(
        self, batch: int, tokens: int, nbytes: int, first: int, twice: bool = False
    ) -> tuple[int, list[TokenSpan], Slots]:
        """For a pass: index of the first kept block, tiles of tokens, and slots of the store."""
        kept_from, spans = len(self.blocks), [TokenSpan(0, tokens)]
        if self._cuts(batch * tokens):
            spans = spans_of(tokens, max(1, self._plan.tile_tokens // batch))
        if first < kept_from:
            kept_from = max(first, kept_from - self._plan.kept_blocks)
        # Of what blocks read of each other, the arrays and the sums of their gradients.
        shared = 2 * sum(len(form.read) for form in self.blocks.forms[:kept_from] if form)
        waiting = max(0, kept_from - first) + 2 * (1 + twice) * (len(spans) > 1) + shared
        store = self._ram if self._plan.inputs == "memory" else self.store
        slot_bytes = batch * nbytes * max(span.stop - span.start for span in spans)
        more = 0
        if len(spans) > 1:
            more = self._state_slots(kept_from, batch, slot_bytes)
            itemsize = (self.blocks.hidden_dtype or mx.float32).size
            more += max(expert_slots(block, itemsize) for block in self.blocks.blocks)
            more += CALL_SLOTS * (tokens > (self._plan.key_tokens or tokens))
        per_tile = waiting + more
        return kept_from, spans, Slots(store, per_tile * len(spans), slot_bytes)

    def _state_slots(self, blocks: int, batch: int, slot_bytes: int) -> int:
        """The most slots that one of the first blocks needs for the states before a tile."""
        found = [self._tiling.tileable(index).recurrence for index in range(blocks)]
        return max(
            [
                slots_of(batch * each.state_bytes, states_in(each.layout), slot_bytes)
                for each in found
                if each is not None
            ],
            default=0,
        )

    def _can_cut(self, index: int, call: BlockCall, tokens: int) -> bool:
        """Whether what a block is called with can be cut into tokens, as in the trial of it."""
        if packing_now() is not None and self._tiling.tileable(index).through_cache:
            return False  # its attention is not known to be in that of mlx-lm
        parts = BlockParts(self.blocks.function(index), call.args, call.kwargs)
        return parts.untileable_reason(tokens) is None

    def finish(self, state: Pass, loss: GraphLoss) -> tuple[mx.array | tuple, Arrays]:
        """Compute the tail of a pass, with its gradients.

        Returns:
            The result of `loss.graph` and the gradients of `loss.outside`, evaluated.
        """
        hidden, state.below_tail = state.below_tail, None
        finished = state.tail.value_and_grad(hidden, loss)
        state.cotangent, state.tail_gradients = finished.dx, finished.by_block
        return finished.value, finished.outside

    @contextmanager
    def tail(self, state: Pass, hidden: mx.array, outside: Arrays | None = None) -> Iterator[None]:
        """Let a call of the model start from the last block's output.

        Args:
            state: the current pass.
            hidden: output of the last block, or [1, n, hidden] rows of it: the layers after the
                blocks work token by token.
            outside: values for trained parameters outside the blocks.
        """
        # The layers before the blocks are called again without effect; dropout reuses its keys.
        with (
            self._tape.playing(state.entry_keys),
            self.blocks.skip_blocks(hidden),
            self._outside_bound(outside or {}),
        ):
            yield

    def backward(self, state: Pass) -> Iterator[Arrays]:
        """Carry `state.cotangent` down to the lowest trained block.

        Yields:
            Evaluated gradients by parameter name: those of one block at a time, from the last
            block to the first, then those before the blocks. Each block is computed when its
            gradients are requested, so only these need to be in memory. The pass cannot be used
            again.
        """
        found, state.tail_gradients = state.tail_gradients, iter(())
        for index, gradients in found:
            yield self._named(index, gradients)
        del found
        dy = None
        if state.cotangent is not None:
            by_rows = state.rows is not None and state.tail is None
            dy = (
                Hidden(state.cotangent)
                if by_rows
                else state.context.to_next_segment(state.cotangent)
            )
        state.cotangent = None
        wanted = [s for s in state.segments if s.index >= state.context.first]
        state.segments = []
        while wanted:
            segment = wanted.pop()

            def ahead(next_segments: list[Segment] = wanted) -> int | None:
                return next_segments[-1].prefetch() if next_segments else None

            dy, gradients = segment.backward(dy, ahead)
            yield self._named(segment.index, gradients)
            del gradients, segment
            self.pause()
        state.context.pipeline.drain()
        if state.context.entry:
            state.cotangent = dy.whole()
            dy.forget()
            yield self._entry_backward(state)

    @property
    def outside_slots(self) -> dict[str, Slot]:
        """Places of the trained parameters outside the blocks, by name."""
        return self._outside

    def outside(self) -> Arrays:
        """Trained parameters outside the blocks, by name."""
        return {name: box[key] for name, (box, key) in self._outside.items()}

    def _named(self, index: int, gradients: Arrays) -> Arrays:
        prefix = f"{self.blocks.prefix}{index}."
        return {prefix + local: value for local, value in gradients.items()}

    def _entry_backward(self, state: Pass) -> Arrays:
        outside = self.outside()
        cotangent, state.cotangent = state.cotangent, None
        with self._tape.playing(state.entry_keys):
            _, gradients = mx.vjp(
                lambda *values: self._entry(state.run, dict(zip(outside, values, strict=True))),
                list(outside.values()),
                [cotangent],
            )
        del cotangent
        mx.eval(gradients)
        return dict(zip(outside, gradients, strict=True))

    def _lowest_reached(self, run: Callable[[], Any]) -> tuple[int, bool]:
        """The lowest block that the backward needs, and whether its input's gradient is needed."""
        if self._reached is None:
            with self._tape.playing(SAME_KEY):
                entry = bool(self._outside) and self._trains_entry(run, self.outside())
            self._reached = (0, True) if entry else (self._block_weights.lowest_trained, False)
        return self._reached

    def _trains_entry(self, run: Callable[[], Any], outside: Arrays) -> bool:
        """Whether the first block's input depends on a trained parameter outside the blocks."""
        keys = mx.random.split(mx.random.key(0), len(outside))
        tangents = [
            mx.random.normal(value.shape, value.dtype, key=key)
            for value, key in zip(outside.values(), keys, strict=True)
        ]
        _, (tangent,) = mx.jvp(
            lambda *values: self._entry(run, dict(zip(outside, values, strict=True))),
            list(outside.values()),
            tangents,
        )
        return bool(mx.any(tangent != 0).item())

    def _entry(self, run: Callable[[], Any], outside: Arrays) -> mx.array:
        with self._outside_bound(outside):
            return first_input(self.blocks, run)

    def _outside_bound(self, outside: Arrays) -> AbstractContextManager:
        return bind_arrays(self._outside, outside)


def _tiled(
    context: Context, index: int, call: BlockCall, wanted: OutputRows, choice: Tileable
) -> Segment:
    """A block that is computed by tiles."""
    if choice.appended:
        return CachedBlock(context, index, call, wanted, choice.appended)
    if choice.recurrence is not None:
        return RecurrentBlock(context, index, call, wanted, choice.recurrence)
    return TiledBlock(context, index, call, wanted, choice.through_cache)


def check_row_indices(rows: mx.array, count: int) -> None:
    """Check that row indices are ascending and within `count` rows; evaluates them.

    Raises:
        ValueError: there are none, or they are no integers, out of range, or not ascending.
    """
    indices = np.asarray(rows)
    bounds = np.concatenate([[-1], indices.reshape(-1), [count]])
    whole = np.issubdtype(indices.dtype, np.integer)
    if indices.ndim != 1 or not indices.size or not whole or (np.diff(bounds) < 1).any():
        raise ValueError(
            f"rows: got {indices.tolist()}, expected one or more indices of {count} tokens, "
            "each once and in ascending order"
        )
