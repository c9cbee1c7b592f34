"""Backpropagation block by block: gradients whose memory does not grow with depth.

The model is walked in explicit segments, outside of any trace. Forward: its own
`__call__` runs with every block intercepted; each is computed and evaluated, its input
goes to an activation store. Loss: differentiated with respect to the last hidden state.
Backward: from the last block to the lowest trained one, the input comes back, the block
is computed again inside one `mx.vjp`, its gradients are evaluated, and all of it is
dropped. One block's graph is alive at a time.

Why not inside one `mx.value_and_grad`: an array evaluated while a gradient is traced
keeps its whole graph, so nothing would be freed. The method is gradient checkpointing
(arXiv 1604.06174) with the checkpoints off the heap, as in arXiv 2606.19528.

Cost: one more forward of the trained blocks. With a plan's `tile_tokens` also the inside of a
block is walked, a tile of tokens at a time (`memory/tiles.py`): hidden states then travel from
block to block as lists of tiles, and what the model's own loop passes on is a placeholder.

With `kept_blocks` the last blocks are the other extreme: one ordinary autodiff segment, whose
activations stay in memory and are not computed again. They are used first in the backward,
so this is the cheapest memory for time.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.order import forget_stops, stops
from mlx_edgelora.memory.dropout import KeyTape, keyed_dropout
from mlx_edgelora.memory.meter import eval_in_step
from mlx_edgelora.memory.plan import Plan
from mlx_edgelora.memory.profile import phase
from mlx_edgelora.memory.promise import Promise
from mlx_edgelora.memory.stores import ActivationStore, RamStore, SplitStore
from mlx_edgelora.memory.tiled_pass import TiledPass
from mlx_edgelora.memory.tiled_walk import Call, TiledWalk
from mlx_edgelora.memory.visits import Arrays, Visits
from mlx_edgelora.model.attention import attention_bounded
from mlx_edgelora.model.blocks import (
    BlockList,
    Handler,
    Slot,
    array_slots,
    bound,
    signature,
)
from mlx_edgelora.model.labelled import LastBlock, put_rows, take_rows
from mlx_edgelora.model.masks import packed, unpacked
from mlx_edgelora.model.norms import norms_bounded
from mlx_edgelora.model.refusals import Refusal
from mlx_edgelora.model.sources import ResidentWeights, TogetherWeights, WeightSource
from mlx_edgelora.model.tiling import Tileable, Tiling
from mlx_edgelora.model.walkable import EVALUATES, checked_blocks

# Part of what MLX says of arguments that are neither arrays nor constants.
NO_TREE = "Function arguments must be trees"
# For dropout in a pass that only looks at the graph: it must not move MLX's generator.
_SAME_KEY = itertools.repeat(mx.random.key(0))


class _Reached(Exception):
    """Carries a hidden state out of the model's own loop."""

    def __init__(self, hidden: mx.array) -> None:
        self.hidden = hidden


class _InOrder:
    """A handler of blocks' calls that refuses them where they are not what the check has seen.

    It has seen few tokens, in training mode: a loop may do otherwise with other ones.

    Attributes:
        due: the block that is called next.
    """

    def __init__(self, blocks: BlockList, handler: Handler) -> None:
        self._blocks, self._handler = blocks, handler
        self.due, self._returned = 0, None

    def __call__(self, index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        if index != self.due:
            raise self._blocks.refusal(index, Refusal.ORDER, due=str(self.due))
        if index and x is not self._returned:
            raise self._blocks.refusal(index, Refusal.INPUT)
        self._returned = self._handler(index, x, args, kwargs)
        self.due += 1
        return self._returned


@dataclass
class Pass:
    """One forward pass waiting for its backward.

    Attributes:
        run: what calls the model.
        first: the lowest block the backward reaches.
        entry: whether the backward goes on to what lies before the blocks.
        rows: which of the batch * tokens rows of the last block's output are needed.
        spared: whether the last block is computed for these alone.
        hidden: the last block's output, [batch, tokens, hidden], or [1, n, hidden] where
            n rows of it were asked for; whoever is done with it sets it to None, so that
            its memory is free during the backward.
        cotangent: the loss's gradient with respect to `hidden`, set before `backward`.
        choices: which blocks are computed by tiles in a pass by tiles.
        tiles: the tiles of such a pass; None for another.
        store: where inputs of blocks wait in this pass.
        kept_from: the lowest of the blocks whose activations are kept.
        segment: these blocks between forward and backward, once the model's loop has ended.
    """

    run: Callable[[], Any]
    first: int
    entry: bool
    rows: mx.array | None = None
    spared: bool = False
    hidden: mx.array | None = None
    cotangent: mx.array | None = None
    calls: dict[int, Call] = field(default_factory=dict)
    choices: list[Tileable] = field(default_factory=list)
    tiles: TiledPass | None = None
    store: ActivationStore | None = None
    kept_from: int = 0
    segment: "_Segment | None" = None
    entry_keys: list[mx.array] = field(default_factory=list)


@dataclass
class _Segment:
    """Blocks whose backward is a graph that waits for the gradient of their output.

    Attributes:
        names: of each block, lowest first, the parameters that are differentiated.
        gradients: theirs, block by block, and last that of the segment's input; lazy.
        cotangent: of the output.
    """

    names: list[list[str]]
    gradients: list[mx.array]
    cotangent: Promise


class BlockWalk:
    """Walks one model forward and backward, a block at a time.

    Args:
        model: any mlx-lm model that `check_walk` accepts.
        store: where inputs of blocks wait for the backward; RAM by default.
        weights: where frozen weights come from; by default they are in the model.
        compiled: compile one backward per block signature (weights are its arguments)
            instead of building each block's graph anew. MLX fuses more then; on a CPU
            it calls a C++ compiler for every fused kernel, which takes seconds. Blocks that
            decide by values what they compute are built anew nevertheless.
        adapters: where trained parameters of the blocks come from; by default they are in
            the model. What lies outside the blocks always is.
        plan: how blocks are computed and where their inputs wait: `prefetch`, `tile_tokens`
            with `halves`, `kept_blocks`, and `ram_blocks`, whose inputs are not in `store`; in
            a pass by tiles only those of all blocks at once.
        rest: called after every block, forward and backward.
        blocks: the model's, if they were checked already.
        like: a walk over a model that has these blocks among others: trials that were made of
            them there are not made again.

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
        rest: Callable[[], None] = lambda: None,
        blocks: BlockList | None = None,
        like: "BlockWalk | None" = None,
    ) -> None:
        self.model, self._rest = model, rest
        self.blocks = blocks or checked_blocks(model)
        self.store = RamStore() if store is None else store
        self.weights = ResidentWeights() if weights is None else weights
        self.adapters = ResidentWeights() if adapters is None else adapters
        self._visits = Visits(self.blocks, self.weights, self.adapters)
        together = TogetherWeights(self.weights, self.adapters)
        self._last = LastBlock(self.blocks, together, like and like._last)
        self._ram = RamStore()
        self._tiling = Tiling(self.blocks, together, like and like._tiling)
        self.obey(plan)
        self._functions: dict[tuple[str, bool], Callable] | None = {} if compiled else None
        self._entry_trained: dict[tuple[str, ...], bool] = {}
        # One for good: a compiled backward and the dropout layers must mean the same tape.
        self._tape = KeyTape()

    def obey(self, plan: Plan) -> None:
        """Compute the passes that begin from now on by another plan."""
        count = len(self.blocks)
        self._kept = min(plan.kept_blocks, count)
        self._ram_blocks = count if plan.ram_blocks is None else min(plan.ram_blocks, count)
        self._visits.prefetches = plan.prefetch
        self._tiled: TiledWalk | None = None
        if plan.tile_tokens is not None:
            settings = plan.tile_tokens, plan.halves
            self._tiled = TiledWalk(self.blocks, self._visits, self._tiling, *settings)

    @property
    def last_block(self) -> str:
        """For which tokens the last block is computed where rows are asked for, and why."""
        return str(self._last.choice())

    @property
    def tiling(self) -> str:
        """Which blocks are computed by tiles of tokens, and why others are not."""
        return "none: all tokens at once" if self._tiled is None else str(self._tiled)

    @property
    def is_compiled(self) -> bool:
        """Whether backwards are compiled."""
        return self._functions is not None

    def tile_choice(self, index: int, tokens: int) -> Tileable | None:
        """How a block of a batch of so many tokens is cut; None where the batch is not."""
        if self._tiled is None or not self._tiled.cuts(tokens):
            return None
        return self._tiling.of(index)

    @contextmanager
    def forward(
        self, run: Callable[[], Any], keep: bool = True, rows: mx.array | None = None
    ) -> Iterator[Pass]:
        """Run the blocks; inside the context the pass can be finished by `backward`.

        Args:
            run: calls the model, directly or inside a loss; stopped after its last block.
            keep: keep the blocks' inputs for a backward pass.
            rows: int [n], ascending: of the batch * tokens rows of the last block's output
                those that are needed. `hidden` and `cotangent` are then [1, n, hidden],
                and where it can be the last block is computed for these rows only.

        Raises:
            ValueError: rows are not what they should be.
        """
        with keyed_dropout(self.model, self._tape), attention_bounded(), norms_bounded():
            first, entry = self._reach(run) if keep else (len(self.blocks), False)
            spared = rows is not None and self._last.choice().spared
            state = Pass(run, first, entry, rows, spared)
            state.kept_from = max(first, len(self.blocks) - self._kept)
            in_ram = state.kept_from - max(first, len(self.blocks) - self._ram_blocks)
            state.store = SplitStore(self.store, self._ram, in_ram) if in_ram > 0 else self.store
            if self._tiled is not None:
                state.choices = self._tiled.choices()
            handler = _InOrder(self.blocks, lambda *call: self._run_block(state, *call))
            with self._tape.recording() as state.entry_keys:
                state.hidden = self._stopped(run, handler)
            if state.tiles is not None:
                state.hidden = self._tiled_forward(state)
            elif state.kept_from in state.calls:
                state.hidden = self._kept_forward(state)
            try:
                yield state
            finally:
                if state.segment is not None:
                    state.segment.cotangent.close()

    @contextmanager
    def tail(self, state: Pass, hidden: mx.array, outside: Arrays | None = None) -> Iterator[None]:
        """Make a call of the model start from the last block's output.

        Args:
            state: the pass that is being finished.
            hidden: what the last block returns, or any [1, n, hidden] rows of it: what
                follows the blocks works token by token.
            outside: values for trained parameters outside the blocks.
        """
        # The model's entry is called again, for nothing; its dropout must not draw again.
        with (
            self._tape.playing(state.entry_keys),
            self.blocks.returning(hidden),
            self._outside_bound(outside or {}),
        ):
            yield

    def backward(self, state: Pass) -> Iterator[Arrays]:
        """Carry `state.cotangent` down to the lowest trained block.

        Yields:
            Evaluated gradients by parameter name, of a block at a time from the last one
            down, then of what lies before the blocks; computed as they are asked for, so
            whoever puts one block's away has no more than these in memory. The pass cannot
            be used again.
        """
        by_block = self._block_backward if state.tiles is None else self._tiled_backward
        last = len(self.blocks)
        if state.segment is not None:
            yield from self._kept_backward(state)
            last = state.kept_from
        for index in range(last - 1, state.first - 1, -1):
            yield by_block(state, index)
            self._rest()
        if state.entry:
            yield self._entry_backward(state)

    def outside(self) -> Arrays:
        """Trained parameters that belong to no block, by name."""
        trained = tree_flatten(self.model.trainable_parameters())
        return {name: value for name, value in trained if self.blocks.local(name) is None}

    def _run_block(
        self, state: Pass, index: int, x: mx.array, args: tuple, kwargs: dict
    ) -> mx.array:
        last = index + 1 == len(self.blocks)
        if index == 0:
            eval_in_step(x)
        if index == 0 and self._tiled is not None:
            store = self._ram if self._ram_blocks == len(self.blocks) else self.store
            state.tiles = self._tiled.begin(x, store, state.first, state.choices)
        if last and state.spared:
            state.spared = state.rows.size < x.shape[0] * x.shape[1]
        if state.tiles is not None:
            # What it is called with is all there is to learn; `_tiled_forward` computes it.
            state.calls[index] = Call(args, kwargs)
            if last:
                raise _Reached(x)
            return mx.zeros(x.shape, x.dtype)  # never computed: the model's loop hands it on
        if index >= state.kept_from:
            state.calls[index] = Call(args, kwargs)
            if index == state.kept_from:
                mx.eval(x)
                state.hidden = x
            if last:
                raise _Reached(state.hidden)
            return mx.zeros(x.shape, x.dtype)  # as above; `_kept_forward` computes it
        return self._run_whole(state, index, x, args, kwargs)

    def _run_whole(
        self, state: Pass, index: int, x: mx.array, args: tuple, kwargs: dict
    ) -> mx.array:
        """Compute a block for all tokens; its input waits for the backward."""
        block, last = self.blocks.blocks[index], index + 1 == len(self.blocks)
        if index == state.first:
            mx.eval(x)
            state.store.reserve(state.kept_from - state.first, x.nbytes)
        if index >= state.first:
            with phase("spill", index):
                state.store.put(index - state.first, x)
        weights = self._visits.arrays(index, None if last else index + 1)
        with self._tape.recording() as keys, bound(array_slots(block), weights):
            del weights
            with phase("forward", index):
                out = self._called(state, index)(x, *args, **kwargs)
                if last and state.rows is not None and not state.spared:
                    out = take_rows(out, state.rows)
                mx.eval(out)
        if index >= state.first:
            state.calls[index] = Call(args, kwargs, keys)
        self._rest()
        if last:
            raise _Reached(out)
        return out

    def _tiled_forward(self, state: Pass) -> mx.array:
        """Compute the blocks of a pass by tiles, which the model's loop has only named."""
        tiles, last = state.tiles, len(self.blocks) - 1
        # A block that is cut at its cache is computed for spans of tokens alone.
        state.spared = state.spared and not state.choices[last].through_cache
        for index, choice in enumerate(state.choices):
            call = state.calls[index] if index >= state.first else state.calls.pop(index)
            if index == last:
                tiles.want(state.rows, state.spared)
            if choice.possible:
                self._tiled.forward(tiles, index, call, choice)
                self._rest()
                continue
            called = self._called(state, index)
            following = None if index == last else index + 1
            with (
                self._tape.recording() as call.keys,
                self._visits.bound(index, following),
                phase("forward", index),
            ):
                out = called(tiles.input(index), *call.args, **call.kwargs)
                mx.eval(out)
            if index == last and state.spared:  # some rows, which are no tiles
                return out
            tiles.put_output(index, out)
            del out
            self._rest()
        return tiles.result()

    def _tiled_backward(self, state: Pass, index: int) -> Arrays:
        onward, choice = index > state.first or state.entry, state.choices[index]
        last = index + 1 == len(self.blocks)
        if last and (choice.possible or not state.spared):
            cotangent, state.cotangent = state.cotangent, None
            state.tiles.begin_backward(cotangent)
            del cotangent
        if choice.possible:
            following = index - 1 if index > state.first else None
            call = state.calls.pop(index)
            found = self._tiled.backward(state.tiles, index, call, choice, following, onward)
            prefix = f"{self.blocks.prefix}{index}."
            gradients = {prefix + local: value for local, value in found.items()}
        else:
            if not (last and state.spared):
                state.cotangent = state.tiles.cotangent()
            gradients = self._block_backward(state, index)
            if onward:
                state.tiles.set_cotangent(state.cotangent)
        if index == state.first and state.entry:
            state.cotangent = state.tiles.cotangent()
        state.tiles.forget(index)
        return gradients

    def _kept_forward(self, state: Pass) -> mx.array:
        """Compute the blocks whose activations are kept, with the graph of their backward."""
        with phase("forward", state.kept_from):
            out = self._kept_graph(state)
            mx.eval(out)
        self._rest()
        return out

    def _kept_graph(self, state: Pass) -> mx.array:
        """The output of these blocks, lazy, as is the `segment` that the pass gets."""
        indices = range(state.kept_from, len(self.blocks))
        trained, bindings = [], []
        for index in indices:
            trained.append(self._trained(index))
            slots = array_slots(self.blocks.blocks[index])
            bindings.append((self._called(state, index), slots, self.weights.block(index)))
        names = [list(arrays) for arrays in trained]
        dtypes = []

        def segment(*primals: mx.array) -> mx.array:
            values, out = iter(primals), primals[-1]
            for index, own, (called, slots, frozen) in zip(indices, names, bindings, strict=True):
                call = state.calls.pop(index)
                with bound(slots, frozen | {name: next(values) for name in own}):
                    out = called(out, *call.args, **call.kwargs)
            if state.rows is not None and not state.spared:
                out = take_rows(out, state.rows)
            dtypes.append(out.dtype)
            return out.astype(mx.float32)

        x, state.hidden = state.hidden, None
        shape = x.shape if state.rows is None else (1, state.rows.size, x.shape[-1])
        # What dtype the last block returns is known too late to promise anything narrower.
        cotangent = Promise(shape, mx.float32)
        primals = [value for arrays in trained for value in arrays.values()]
        try:
            (out,), gradients = mx.vjp(segment, [*primals, x], [cotangent.array])
        except BaseException:
            cotangent.close()
            raise
        if state.kept_from == state.first and not state.entry:
            gradients[-1] = None
        state.segment = _Segment(names, gradients, cotangent)
        return out.astype(dtypes[0])

    def _kept_backward(self, state: Pass) -> Iterator[Arrays]:
        segment, cotangent = state.segment, state.cotangent
        state.cotangent = None
        segment.cotangent.keep(cotangent.astype(mx.float32))
        segment.cotangent.array = None
        del cotangent
        gradients = segment.gradients
        state.cotangent = gradients.pop()
        for index in range(len(self.blocks) - 1, state.kept_from - 1, -1):
            names = segment.names.pop()
            own = [gradients.pop() for _ in names][::-1]
            with phase("backward", index):
                mx.eval(own)
            prefix = f"{self.blocks.prefix}{index}."
            found = {prefix + local: value for local, value in zip(names, own, strict=True)}
            del own
            yield found
            del found
            self._rest()
        if state.cotangent is not None:
            mx.eval(state.cotangent)

    def _trained(self, index: int) -> Arrays:
        """What is trained of a block, by name inside it, from wherever it waits."""
        own = dict(tree_flatten(self.blocks.blocks[index].trainable_parameters()))
        return own | self.adapters.block(index)

    def _called(self, state: Pass, index: int) -> Callable[..., mx.array]:
        """What is called, and differentiated, where a block is due."""
        if state.spared and index + 1 == len(self.blocks):
            return self._last.function(state.rows)
        return self.blocks.blocks[index]

    def _block_backward(self, state: Pass, index: int) -> Arrays:
        call = state.calls.pop(index)
        trained = self._trained(index)
        onward = index > state.first or state.entry
        weights = self.weights.block(index)
        if state.tiles is None:
            x = state.store.take(index - state.first)
        else:
            x = state.tiles.input(index)
        if (
            state.tiles is None
            and index + 1 == len(self.blocks)
            and state.rows is not None
            and not state.spared
        ):
            state.cotangent = put_rows(state.cotangent, state.rows, x.shape)
        operands = [list(trained.values()), weights, x, state.cotangent]
        state.cotangent = None
        del weights, x
        self._visits.read_ahead(index - 1 if index > state.first else None)
        if index > state.first and state.tiles is None:
            state.store.prefetch(index - 1 - state.first)
        with phase("backward", index):
            with nullcontext() if self._functions is not None else stops() as order:
                gradients = self._vjp(state, index, list(trained), onward)(operands, call)
            del operands
            if order is not None:  # tile by tile, so that MLX does not allocate ahead
                order.eval()
            mx.eval(gradients)
        if onward:
            state.cotangent = gradients.pop()
        name = f"{self.blocks.prefix}{index}."
        return {name + local: value for local, value in zip(trained, gradients, strict=True)}

    def _vjp(self, state: Pass, index: int, names: list[str], onward: bool) -> Callable:
        """The backward of one block: (operands, call) -> gradients of `names`, then of x."""
        block, called = self.blocks.blocks[index], self._called(state, index)
        slots = array_slots(block)
        plain = _block_vjp(called, slots, self._tape, names, onward)
        if self._functions is None:
            return lambda operands, call: plain(*operands, call.args, call.kwargs, call.keys)
        function = mx.compile(plain)
        # For some rows it is compiled for this once: their number and places are other ones
        # in every batch, and MLX keeps each graph as long as the function lives.
        if called is block:
            key = (signature(block) + repr(names), onward)
            function = self._functions.setdefault(key, function)

        def run(operands: list, call: Call) -> list[mx.array]:
            # Whatever the compiled function does not get as an argument it keeps for good.
            held = {n: box[k] for n, (box, k) in slots.items() if n not in names}
            operands[1] = held | operands[1]
            try:
                return function(*operands, *packed(call.args, call.kwargs), call.keys)
            except (ValueError, RuntimeError) as error:
                if not any(text in str(error) for text in (EVALUATES, NO_TREE)):
                    raise
                # A block that decides by values what it computes has no one graph, and there are
                # arguments that MLX does not compile.
                return plain(*operands, call.args, call.kwargs, call.keys)

        return run

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

    def _reach(self, run: Callable[[], Any]) -> tuple[int, bool]:
        """How far down the backward must go: the lowest block, and whether beyond it."""
        outside = self.outside()
        with self._tape.playing(_SAME_KEY):
            entry = bool(outside) and self._trains_entry(run, outside)
        if entry:
            return 0, True
        trained = tree_flatten(self.model.trainable_parameters())
        places = [self.blocks.local(name) for name, _ in trained]
        return min((place[0] for place in places if place), default=len(self.blocks)), False

    def _trains_entry(self, run: Callable[[], Any], outside: Arrays) -> bool:
        """Whether a parameter outside the blocks has a part in the first block's input."""
        names = tuple(outside)
        if names not in self._entry_trained:
            keys = mx.random.split(mx.random.key(0), len(outside))
            tangents = [
                mx.random.normal(value.shape, value.dtype, key=key)
                for value, key in zip(outside.values(), keys, strict=True)
            ]
            _, (tangent,) = mx.jvp(
                lambda *values: self._entry(run, dict(zip(names, values, strict=True))),
                list(outside.values()),
                tangents,
            )
            self._entry_trained[names] = bool(mx.any(tangent != 0).item())
        return self._entry_trained[names]

    def _entry(self, run: Callable[[], Any], outside: Arrays) -> mx.array:
        def stop(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
            raise _Reached(x)

        with self._outside_bound(outside):
            return self._stopped(run, stop)

    def _outside_bound(self, outside: Arrays) -> AbstractContextManager:
        return bound(array_slots(self.model) if outside else {}, outside)

    def _stopped(self, run: Callable[[], Any], handler: Handler) -> mx.array:
        with self.blocks.intercepted(handler):
            try:
                run()
            except _Reached as reached:
                return reached.hidden
        if isinstance(handler, _InOrder) and handler.due:
            raise self.blocks.refusal(handler.due, Refusal.NOT_CALLED)
        raise EdgeLoraError(
            "value_and_grad: the loss returned without calling the model, expected one call; "
            "call the model given to value_and_grad inside the loss"
        )


def _block_vjp(
    called: Callable[..., mx.array],
    slots: dict[str, Slot],
    tape: KeyTape,
    names: list[str],
    onward: bool,
) -> Callable:
    def vjp(
        trained: list[mx.array],
        frozen: Arrays,
        x: mx.array,
        cotangent: mx.array,
        args: tuple,
        kwargs: dict,
        keys: Sequence[mx.array],
    ) -> list[mx.array]:
        args, kwargs = unpacked(args, kwargs)

        def forward(*primals: mx.array) -> mx.array:
            values = frozen | dict(zip(names, primals[:-1], strict=True))
            with bound(slots, values), tape.playing(keys):
                out = called(primals[-1], *args, **kwargs)
            forget_stops()  # the backward may not need all of the forward
            return out

        _, gradients = mx.vjp(forward, [*trained, x], [cotangent])
        return gradients if onward else gradients[:-1]

    return vjp
