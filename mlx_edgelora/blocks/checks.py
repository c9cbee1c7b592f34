"""Check that a model can be walked block by block, or refuse it with a reason.

In the walk, blocks depend on each other only through the hidden state. A model with any other
dependency (shared keys and values, an input passed around the blocks, a router's loss, a trained
matrix in two blocks) would silently get wrong gradients. `blocks/refusals.py` lists the reasons.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.arguments import all_leaves, different_argument, has_nan, identity
from mlx_edgelora.blocks.block_list import BlockList, Handler, Slot, array_slots, bind_arrays
from mlx_edgelora.blocks.dropout import KeyTape, dropout_layers, keyed_dropout
from mlx_edgelora.blocks.hidden_argument import find_call_form
from mlx_edgelora.blocks.lookups import any_embeddings
from mlx_edgelora.blocks.outputs import SHAPES, Linked, find_form, links_of, map_leaves
from mlx_edgelora.blocks.refusals import Refusal, refusal_error
from mlx_edgelora.blocks.settling import settles
from mlx_edgelora.blocks.tracing import gradient_hook
from mlx_edgelora.errors import EdgeLoraError

# The arguments of a block: x, args, kwargs.
RecordedCall = tuple[mx.array, tuple, dict]
# Errors of a model that cannot run with replaced blocks.
MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
TOKENS = (1, 4)


def checked_blocks(model: nn.Module) -> BlockList:
    """Check that a model, adapted or not, can be walked, and return its blocks.

    Every command calls this before it uses a model in any other way. It reads no weights and takes
    5 to 20 milliseconds a block, more for models with more blocks.

    Raises:
        EdgeLoraError: names the architecture, the block and the reason.
    """
    blocks, tape = BlockList(model), KeyTape()
    resting = [module for module in model.modules() if not module.training]
    try:
        model.train()  # some architectures compute something else in evaluation mode
        # Dropout must not count as random numbers of a block, and not advance MLX's generator.
        layers = keyed_dropout(dropout_layers(model), tape)
        keys = tape.playing(itertools.repeat(mx.random.key(0)))
        with layers, keys, any_embeddings(model):
            blocks.call_form = find_call_form(blocks)
            check_walk(blocks)
    finally:
        for module in resting:
            module._training = False
    return blocks


def check_walk(blocks: BlockList) -> None:
    """Check that the model can be walked block by block.

    1. The model's loop runs on four tokens with blocks that are not computed. Each block must be
       called once, in order, on the output of the block before. No other argument may depend on
       the output of a block (unless it is one of the arrays that a block returns, unchanged) or on
       trained parameters outside the blocks, and the logits may depend only on the last block:
       gradients of other dependencies would be lost.
    2. The loop runs with the blocks' own graphs, built on zeros. Each block must get the same
       arguments as before, return a hidden state of its input's shape, and change nothing.
    3. The gradients of blocks are built. None may reach another block's input or its trained
       parameters.

    Only arguments of blocks are evaluated, so with `any_embeddings` no weights are read.

    Raises:
        EdgeLoraError: names the architecture, the block and the reason.
    """
    _check_owners(blocks)
    calls = _linked_calls(blocks)
    _check_arguments(blocks, calls, Refusal.SHARED_STATE)
    trained = tree_flatten(blocks.model.trainable_parameters())
    entry = {n: mx.full(v.shape, float("nan")) for n, v in trained if blocks.local(n) is None}
    if entry:
        with bind_arrays(array_slots(blocks.model), entry):
            # The first block's input may depend on them, so blocks return zeros instead.
            reached = _placeholder_calls(blocks, lambda index, x: mx.zeros(x.shape, x.dtype))
            _check_arguments(blocks, reached, Refusal.ENTRY)
    for index, (x, *arguments) in enumerate(_placeholder_calls(blocks, _marker)):
        if index and not mx.array_equal(x, _marker(index - 1, x)).item():
            raise blocks.refusal(index, Refusal.CHANGED_INPUT)
        if difference := different_argument(calls[index][1:], tuple(arguments)):
            raise blocks.refusal(index, Refusal.OTHER_CALL, name=difference)
    _check_tail(blocks, mx.zeros(calls[-1][0].shape, calls[-1][0].dtype))
    before = list(map(identity, blocks.blocks))
    _calls(blocks, lambda *call: _checked_output(blocks, calls, before, *call))
    _check_crossings(blocks)


def _check_owners(blocks: BlockList) -> None:
    """Refuse a trained array in two blocks: it would get two partial gradients."""
    slots = array_slots(blocks.model)
    owners: dict[tuple[int, Any], int | None] = {}
    for name, _ in tree_flatten(blocks.model.trainable_parameters()):
        container, key = slots[name]
        index = (blocks.local(name) or (None,))[0]
        other = owners.setdefault((id(container), key), index)
        if other != index:
            where = "outside the blocks" if None in (other, index) else f"in block {other}"
            index = index or other or 0
            raise blocks.refusal(index, Refusal.OWNERS, name=name, where=where)


def _linked_calls(blocks: BlockList) -> list[RecordedCall]:
    """The arguments of each block if blocks return NaN; finds what blocks return and read."""

    def nan(index: int, x: mx.array) -> mx.array:
        return mx.full(x.shape, float("nan"), x.dtype)

    try:
        calls = _placeholder_calls(blocks, nan)
    except EdgeLoraError:
        if not _find_forms(blocks):
            raise
        calls = _placeholder_calls(blocks, nan)
    for _, args, kwargs in calls:
        for link in links_of(args, kwargs):
            form = blocks.forms[link.source]
            if not form.leaves[link.leaf].is_tokens:
                raise blocks.refusal(link.source, Refusal.CROSSING)
            form.read = tuple(sorted({*form.read, link.leaf}))
    return calls


def _find_forms(blocks: BlockList) -> bool:
    """Find what blocks return besides their hidden state; False if there is nothing known."""
    runs: list[list[tuple]] = []

    def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> Any:
        slots = array_slots(blocks.blocks[index])
        with bind_arrays(slots, _zeros(slots)):
            out = blocks.function(index)(x, *args, **kwargs)
        runs[-1].append((index, out, [args, kwargs]))
        return out

    try:
        for shape in SHAPES:
            runs.append([])
            with blocks.intercept(handler):
                blocks.model(mx.zeros(shape, mx.int32))
    except MODEL_ERRORS:
        return False
    if [len(run) for run in runs] != [len(blocks)] * len(runs):
        return False
    forms = []
    for both in zip(*runs, strict=True):
        forms.append(find_form([out for _, out, _ in both], [given for *_, given in both]))
        if forms[-1] is None:
            return False
    blocks.forms = [form if len(form.leaves) > 1 else None for form in forms]
    return any(blocks.forms)


def _zeros(slots: Mapping[str, Slot]) -> dict[str, mx.array]:
    return {name: mx.zeros(box[key].shape, box[key].dtype) for name, (box, key) in slots.items()}


def _marker(index: int, x: mx.array) -> mx.array:
    return mx.random.normal(x.shape, x.dtype, key=mx.random.key(index))


def _calls(blocks: BlockList, handler: Handler) -> list[RecordedCall]:
    """Run the model's own loop on a few tokens and return the arguments of each block.

    Args:
        blocks: the model's blocks.
        handler: called in place of each block; its result is the block's output.

    Raises:
        EdgeLoraError: blocks are not called once and in order.
    """
    calls: list[RecordedCall] = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        if index != len(calls):
            raise blocks.refusal(index, Refusal.ORDER, due=str(len(calls)))
        calls.append((x, args, kwargs))
        return handler(index, x, args, kwargs)

    drawn = _generators()
    try:
        with blocks.intercept(record):
            blocks.model(mx.arange(1, 1 + TOKENS[1])[None])
    except MODEL_ERRORS as error:
        last = max(len(calls) - 1, 0)
        raise blocks.refusal(last, Refusal.SEVERAL_OUTPUTS, error=str(error)) from error
    if _generators() != drawn:
        raise refusal_error(blocks.model, Refusal.RANDOM)
    if len(calls) < len(blocks):
        raise blocks.refusal(len(calls), Refusal.NOT_CALLED)
    return calls


def _placeholder_calls(
    blocks: BlockList, output: Callable[[int, mx.array], mx.array]
) -> list[RecordedCall]:
    """The arguments of each block if blocks return `output(index, x)`."""
    returned: list[mx.array] = []

    def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        if index and x is not returned[-1]:
            raise blocks.refusal(index, Refusal.INPUT)
        if not isinstance(x, mx.array) or x.ndim != 3 or x.shape[:2] != TOKENS:
            shape = str(getattr(x, "shape", type(x).__name__))
            raise blocks.refusal(index, Refusal.HIDDEN, shape=shape)
        returned.append(output(index, x))
        if (form := blocks.forms[index]) is None:
            return returned[-1]
        return form.wrap(returned[-1], index, (x, args, kwargs), nan=True)

    return _calls(blocks, handler)


def _check_arguments(blocks: BlockList, calls: list[RecordedCall], reason: Refusal) -> None:
    for index, (_, *others) in enumerate(calls):
        if any(map(has_nan, all_leaves(others))):
            raise blocks.refusal(index, reason)


def _check_tail(blocks: BlockList, hidden: mx.array) -> None:
    """Refuse a model whose logits depend on the output of an earlier block."""
    used: set[int] = set()
    hidden_seen: list[mx.array] = []

    def returned(index: int, *call: Any) -> Any:
        out = gradient_hook(lambda: used.add(index))(hidden_seen[0])
        if (form := blocks.forms[index]) is None:
            return out
        watch, zero = gradient_hook(lambda: used.add(~index)), 0 * hidden_seen[0].sum()
        return map_leaves(
            lambda leaf: watch(leaf + zero) if isinstance(leaf, Linked) else leaf,
            form.wrap(out, index, call),
        )

    def logits(hidden: mx.array) -> mx.array:
        hidden_seen[:] = [hidden]
        with blocks.intercept(returned):
            found = blocks.model(mx.arange(1, 1 + TOKENS[1])[None])
        arrays = [value for _, value in tree_flatten(found) if isinstance(value, mx.array)]
        return sum(array.sum() for array in arrays if mx.issubdtype(array.dtype, mx.floating))

    try:
        mx.grad(logits)(hidden)
    except MODEL_ERRORS as error:
        raise blocks.refusal(len(blocks) - 1, Refusal.TAIL, error=str(error)) from error
    early = used - {len(blocks) - 1}
    if early:
        raise blocks.refusal(min(max(tag, ~tag) for tag in early), Refusal.USED_LATER)


def _checked_output(
    blocks: BlockList,
    calls: Sequence[RecordedCall],
    before: Sequence[list],
    index: int,
    x: mx.array,
    args: tuple,
    kwargs: dict,
) -> mx.array:
    """Check one call of a block and return its output for zeros, with zeros as weights.

    The output has the dtype of the hidden states, which may get wider from block to block.
    """
    block, zeros = blocks.blocks[index], mx.zeros(x.shape, x.dtype)
    if difference := different_argument(calls[index][1:], (args, kwargs)):
        raise blocks.refusal(index, Refusal.OTHER_CALL, name=difference)
    if identity(block) != before[index]:
        raise blocks.refusal(index, Refusal.SET)
    slots = array_slots(block)
    # A block that evaluates values must not read its weights for that.
    drawn = _generators()
    with bind_arrays(slots, _zeros(slots)):
        own = identity(block), list(map(id, all_leaves([args, kwargs])))
        try:
            out = blocks.function(index)(zeros, *args, **kwargs)
        except MODEL_ERRORS as error:
            raise blocks.refusal(index, Refusal.FAILS, error=str(error)) from error
        after = identity(block), list(map(id, all_leaves([args, kwargs])))
        mutates = after != own and not (
            after[1] == own[1]
            and settles(block, lambda x: blocks.function(index)(x, *args, **kwargs), zeros)
        )
    if not _returns_as_before(blocks, index, out):
        raise blocks.refusal(index, Refusal.NO_ARRAY, kind=type(out).__name__)
    out = blocks.outputs(index, out)[0]
    if out.shape != x.shape:
        shapes = {"shape": str(x.shape), "other": str(out.shape)}
        raise blocks.refusal(index, Refusal.OTHER_SHAPE, **shapes)
    if mutates:
        raise blocks.refusal(index, Refusal.MUTATES)
    if _generators() != drawn:
        raise blocks.refusal(index, Refusal.RANDOM)
    blocks.hidden_dtype = out.dtype
    return out


def _returns_as_before(blocks: BlockList, index: int, out: Any) -> bool:
    """Whether a block returned its hidden state, with what `_find_forms` found besides it."""
    if (form := blocks.forms[index]) is None:
        return isinstance(out, mx.array)
    return form.fits(out)


def _generators() -> tuple:
    """The states of all random number generators that a model may use."""
    _, words, position, *_ = np.random.get_state()
    return mx.random.state[0].tolist(), random.getstate(), words.tobytes(), position


def _check_crossings(blocks: BlockList) -> None:
    """Refuse a model whose blocks depend on each other other than through the hidden state.

    The inputs of blocks and the trained parameters are detached and observed. The gradients of some
    of the blocks at a time are built; none may reach an observer of the others.
    """
    gradients = _Gradients(blocks)
    for chosen in _separations(len(blocks)):
        for tag in gradients.reached(chosen):
            if tag is None:
                raise blocks.refusal(min(chosen), Refusal.ENTRY)
            if tag not in chosen:
                raise blocks.refusal(max(tag, ~tag), Refusal.CROSSING)


def _separations(count: int) -> list[set[int]]:
    """Sets of blocks, as few as can be, of which one has the first of any two and not the second.

    Every block is in the same number of sets, and no two blocks are in exactly the same ones
    (Sperner): 8 sets are enough for 70 blocks.
    """
    sets = next(n for n in itertools.count(1) if math.comb(n, max(1, n // 2)) >= count)
    places = itertools.combinations(range(sets), max(1, sets // 2))
    found: list[set[int]] = [set() for _ in range(sets)]
    for index, place in zip(range(count), places, strict=False):
        for number in place:
            found[number].add(index)
    return [chosen for chosen in found if chosen]


class _Gradients:
    """Builds gradients of blocks whose inputs and trained parameters are detached and observed."""

    def __init__(self, blocks: BlockList) -> None:
        self._blocks, self._slots = blocks, array_slots(blocks.model)
        self._trained = dict(tree_flatten(blocks.model.trainable_parameters()))
        self._owners = {name: (blocks.local(name) or (None,))[0] for name in self._trained}
        shared = {id(self._slots[name][0]) for name in self._trained}
        self._frozen = []  # slots of each block, and zeros for what is not trained
        for own in map(array_slots, blocks.blocks):
            frozen = {name: slot for name, slot in own.items() if id(slot[0]) not in shared}
            self._frozen.append((own, _zeros(frozen)))

    def reached(self, chosen: set[int]) -> set[int | None]:
        """The inputs, outputs and parameters that the gradients of the chosen blocks reach.

        A tag is the index of a block (its input or parameters), ~index (the state passed on after a
        block), or None (parameters outside the blocks).
        """
        blocks, reached = self._blocks, set()

        def run(start: mx.array) -> list[mx.array]:
            outputs: list[mx.array] = []

            def watched(tag: int | None) -> mx.array:
                return gradient_hook(lambda: reached.add(tag))(start)

            def cut(zero: mx.array, like: mx.array) -> mx.array:
                return mx.zeros(like.shape, like.dtype) + zero.astype(like.dtype)

            def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
                try:
                    with bind_arrays(*self._frozen[index]):
                        out = blocks.function(index)(cut(watched(index), x), *args, **kwargs)
                except MODEL_ERRORS as error:
                    raise blocks.refusal(index, Refusal.FAILS, error=str(error)) from error
                if index in chosen:
                    found = blocks.outputs(index, out)
                    outputs.append(sum(array.astype(mx.float32).sum() for array in found))
                return cut(watched(~index), x)

            zeros = {tag: watched(tag) for tag in set(self._owners.values())}
            values = {n: cut(zeros[self._owners[n]], v) for n, v in self._trained.items()}
            with bind_arrays(self._slots, values), blocks.intercept(handler):
                blocks.model(mx.arange(1, 1 + TOKENS[1])[None])
            return outputs

        try:
            mx.vjp(run, [mx.zeros(())], [mx.zeros(()) for _ in chosen])
        except MODEL_ERRORS as error:
            raise blocks.refusal(min(chosen), Refusal.NO_GRADIENT, error=str(error)) from error
        return reached
