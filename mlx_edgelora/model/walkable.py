"""Which models can be walked block by block: proved before training, or refused by name.

The walk knows one way from block to block: the hidden state. A model in which anything
else leads there (shared keys and values, an input passed around the blocks, a router's
loss, a trained matrix in two blocks) would get wrong gradients without a word.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.blocks import BlockList, array_slots, bound

# What a block is called with: x, args, kwargs.
Call = tuple[mx.array, tuple, dict]
# What a model may answer with where it cannot be run with other blocks than its own.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)


def check_walk(blocks: BlockList) -> None:
    """Prove that the model can be walked block by block, or refuse it by name.

    The model's loop is run on four tokens with blocks that are not computed: each must be
    called once, in order, on exactly what the one before returned. A gradient that went
    another way would be lost, so no other argument may depend on what a block returned or
    on what is trained before the blocks, and the logits only on the last block. Then each
    block's own graph is built: it must return one array of its input's shape and change
    nothing. Only such arguments are evaluated, so no weights are read.

    Raises:
        EdgeLoraError: names the architecture, the block and the reason.
    """
    _check_owners(blocks)
    calls = _loop(blocks, lambda index, x: mx.full(x.shape, float("nan"), x.dtype))
    _check_arguments(blocks, calls, "it shares state with earlier blocks")
    trained = tree_flatten(blocks.model.trainable_parameters())
    entry = {n: mx.full(v.shape, float("nan")) for n, v in trained if blocks.local(n) is None}
    if entry:
        with bound(array_slots(blocks.model), entry):
            # The first block's input may depend on them, so it is not passed on.
            reached = _loop(blocks, lambda index, x: mx.zeros(x.shape, x.dtype))
            _check_arguments(blocks, reached, "trained parameters outside the blocks reach it")
    for index, (x, *_) in enumerate(_loop(blocks, _marker)):
        if index and not mx.array_equal(x, _marker(index - 1, x)).item():
            raise _refusal(blocks, index, "the model changes what the block before returned")
    _check_tail(blocks, mx.zeros(calls[-1][0].shape, calls[-1][0].dtype))
    for index, (x, args, kwargs) in enumerate(calls):
        _check_block(blocks, index, mx.zeros(x.shape, x.dtype), args, kwargs)


def _check_owners(blocks: BlockList) -> None:
    """A trained array that hangs in two blocks would get two gradients, each a part of its own."""
    slots = array_slots(blocks.model)
    owners: dict[tuple[int, Any], int | None] = {}
    for name, _ in tree_flatten(blocks.model.trainable_parameters()):
        container, key = slots[name]
        index = (blocks.local(name) or (None,))[0]
        other = owners.setdefault((id(container), key), index)
        if other != index:
            where = "outside the blocks" if None in (other, index) else f"in block {other}"
            raise _refusal(blocks, index or other or 0, f"{name} is trained {where} too")


def _marker(index: int, x: mx.array) -> mx.array:
    return mx.random.normal(x.shape, x.dtype, key=mx.random.key(index))


def _loop(blocks: BlockList, output: Callable[[int, mx.array], mx.array]) -> list[Call]:
    """Run the model's own loop over blocks that return `output(index, x)`; gives the calls."""
    calls: list[Call] = []
    returned: list[mx.array] = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        if index != len(calls):
            raise _refusal(blocks, index, f"it is called where block {len(calls)} is due")
        if index and x is not returned[-1]:
            raise _refusal(blocks, index, "its input is not what the block before returned")
        calls.append((x, args, kwargs))
        returned.append(output(index, x))
        return returned[-1]

    try:
        with blocks.intercepted(record):
            blocks.model(mx.array([[1, 2, 3, 4]]))
    except MODEL_ERRORS as error:
        reason = f"the model cannot go on with one array from it ({error})"
        raise _refusal(blocks, max(len(calls) - 1, 0), reason) from error
    if len(calls) < len(blocks):
        raise _refusal(blocks, len(calls), "the model does not call it from its list of blocks")
    return calls


def _check_arguments(blocks: BlockList, calls: list[Call], reason: str) -> None:
    for index, (_, *others) in enumerate(calls):
        if any(map(_has_nan, _leaves(others))):
            raise _refusal(blocks, index, reason)


def _check_tail(blocks: BlockList, hidden: mx.array) -> None:
    """Find the blocks on whose output the logits depend, by building the gradient."""
    used: set[int] = set()

    def logits(hidden: mx.array) -> mx.array:
        with blocks.intercepted(lambda index, *_: watched(lambda: used.add(index))(hidden)):
            return blocks.model(mx.array([[1, 2, 3, 4]])).sum()

    mx.grad(logits)(hidden)
    early = used - {len(blocks) - 1}
    if early:
        raise _refusal(blocks, min(early), "its output is used behind the last block too")


def watched(when_reached: Callable[[], None]) -> Callable[[mx.array], mx.array]:
    """An identity that tells when a gradient passes through it."""

    @mx.custom_function
    def identity(x: mx.array) -> mx.array:
        return x * 1

    @identity.vjp
    def backward(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        when_reached()
        return cotangent

    return identity


def _check_block(blocks: BlockList, index: int, x: mx.array, args: tuple, kwargs: dict) -> None:
    block = blocks.blocks[index]
    before = _identity(block), list(map(id, _leaves([args, kwargs])))
    drawn = mx.array(mx.random.state[0])
    try:
        out = block(x, *args, **kwargs)
    except MODEL_ERRORS as error:
        raise _refusal(blocks, index, f"it cannot be called ({error})") from error
    if not isinstance(out, mx.array):
        raise _refusal(blocks, index, f"it returns a {type(out).__name__}, not one array")
    if out.shape != x.shape:
        raise _refusal(blocks, index, f"it maps {x.shape} to {out.shape}")
    if (_identity(block), list(map(id, _leaves([args, kwargs])))) != before:
        raise _refusal(blocks, index, "it changes its own attributes or arguments when called")
    if not mx.array_equal(drawn, mx.random.state[0]).item():
        raise _refusal(blocks, index, "it draws random numbers, other ones at recomputation")


def _leaves(value: Any) -> list:
    """What nested arguments hold, attributes of objects among them included."""
    leaves = [leaf for _, leaf in tree_flatten(value, is_leaf=_is_module)]
    inside = [vars(leaf) for leaf in leaves if hasattr(leaf, "__dict__")]
    return leaves + [leaf for _, leaf in tree_flatten(inside, is_leaf=_is_module)]


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _identity(block: nn.Module) -> list:
    arrays = [(name, id(box[key])) for name, (box, key) in array_slots(block).items()]
    plain = [(path, key, id(v)) for path, m in block.named_modules() for key, v in vars(m).items()]
    return arrays + plain


def _has_nan(value: Any) -> bool:
    return (
        isinstance(value, mx.array)
        and mx.issubdtype(value.dtype, mx.floating)
        and bool(mx.isnan(value).any().item())
    )


def _refusal(blocks: BlockList, index: int, reason: str) -> EdgeLoraError:
    architecture = type(blocks.model).__module__.rpartition(".")[2]
    return EdgeLoraError(
        f"{architecture}: block {index} ({type(blocks.blocks[index]).__name__}) cannot be trained "
        f"block by block: {reason}; train this architecture with mlx_lm.lora"
    )
