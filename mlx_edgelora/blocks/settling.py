"""See whether arrays that a block replaces when it is called settle at once.

Gemma 3n clips some of its weights in place whenever a block is called. That is harmless where one
call leaves what the next one would: the walk starts every call from the weights of the checkpoint.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import array_slots, bind_arrays


def settles(block: nn.Module, call: Callable[[mx.array], Any], x: mx.array) -> bool:
    """Whether a call replaces no arrays but frozen ones, which a second call leaves as they are.

    Args:
        block: the block; its arrays are bound to others while it is called, and those that it
            replaces are evaluated.
        call: calls it for an input, with its other arguments.
        x: such an input.
    """
    slots = array_slots(block)
    before = {name: box[key] for name, (box, key) in slots.items()}
    plain = _attributes(block)
    with bind_arrays(slots, before):
        call(x)
        replaced = [name for name, (box, key) in slots.items() if box[key] is not before[name]]
    trained = {name for name, _ in tree_flatten(block.trainable_parameters())}
    if not replaced or trained & set(replaced) or _attributes(block) != plain:
        return False
    # Large values, because a small one may lie within the limits to which it is clipped.
    others = {
        name: 10 * mx.random.normal(before[name].shape, key=mx.random.key(number))
        for number, name in enumerate(replaced)
    }
    others = {name: value.astype(before[name].dtype) for name, value in others.items()}
    with bind_arrays(slots, before | others):
        seen = []
        for value in (x, x + 1):
            call(value)
            seen.append([slots[name][0][slots[name][1]] for name in replaced])
        same = [mx.array_equal(*pair).item() for pair in zip(*seen, strict=True)]
    return all(same)


def _attributes(block: nn.Module) -> list:
    """The identities of all attributes that are no arrays."""
    return [(path, key, id(v)) for path, m in block.named_modules() for key, v in vars(m).items()]
