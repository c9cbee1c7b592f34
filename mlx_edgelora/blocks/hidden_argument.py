"""Find out how a model passes hidden states to its blocks, by a trial of its loop.

The argument of the second block that is what the first one returned is the hidden state, and the
axes that change with the size of the batch are those of batch and tokens. No architecture is named.
"""

import inspect
from typing import Any

import mlx.core as mx

from mlx_edgelora.blocks.block_list import BlockList, array_slots, bind_arrays
from mlx_edgelora.blocks.call_form import CallForm
from mlx_edgelora.blocks.outputs import SHAPES


class _SecondBlock(Exception):
    """Ends the model's loop at its second block."""


def find_call_form(blocks: BlockList) -> CallForm | None:
    """How a model passes hidden states; None if as most do, or if that cannot be found.

    Nothing is evaluated and no weights are read.
    """
    if len(blocks) < 2:
        return None
    found = [_second_input(blocks, shape) for shape in SHAPES]
    if None in found:
        return None
    (name, first, is_first), (other, second, _) = found
    if name != other or len(first) != len(second):
        return None
    pairs = list(zip(first, second, strict=True))
    axes = tuple(pairs.index(p) if p in pairs else None for p in zip(*SHAPES, strict=True))
    if None in axes or (is_first and len(first) == 3):
        return None
    return CallForm(name, axes, tuple(n for axis, n in enumerate(first) if axis not in axes))


def _second_input(
    blocks: BlockList, shape: tuple[int, int]
) -> tuple[str, tuple[int, ...], bool] | None:
    """The parameter of the second block that the first returned: name, shape, whether it is first.

    None if there is not exactly one.
    """
    returned: list[Any] = []
    found = []

    def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> Any:
        block = blocks.blocks[index]
        if not returned:
            slots = array_slots(block)
            zeros = {n: mx.zeros(box[key].shape, box[key].dtype) for n, (box, key) in slots.items()}
            with bind_arrays(slots, zeros):
                returned.append(block(x, *args, **kwargs))
            return returned[0]
        call = inspect.signature(type(block).__call__).bind(block, x, *args, **kwargs)
        for place, (name, value) in enumerate(call.arguments.items()):
            if value is returned[0] and isinstance(value, mx.array):
                found.append((name, value.shape, place == 1))
        raise _SecondBlock

    try:
        with blocks.intercept(handler):
            blocks.model(mx.zeros(shape, mx.int32))
    except _SecondBlock:
        pass
    return found[0] if len(found) == 1 else None
