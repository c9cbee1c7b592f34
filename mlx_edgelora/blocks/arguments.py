"""Compare and look into the arguments of blocks."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import array_slots
from mlx_edgelora.blocks.masks import CausalMask, band_of
from mlx_edgelora.blocks.outputs import Linked, Position


def different_argument(expected: tuple[tuple, dict], got: tuple[tuple, dict]) -> str | None:
    """The first argument of a call (args, kwargs) that is not as expected; None if all are.

    Arrays are evaluated, except masks with a band.
    """
    names = [f"argument {number + 2}" for number in range(len(expected[0]))] + list(expected[1])
    if len(expected[0]) != len(got[0]) or expected[1].keys() != got[1].keys():
        return "number of arguments"
    for name, *pair in zip(
        names, (*expected[0], *expected[1].values()), (*got[0], *got[1].values()), strict=True
    ):
        leaves = [tree_flatten(value, is_leaf=_is_module) for value in pair]
        if [place for place, _ in leaves[0]] != [place for place, _ in leaves[1]]:
            return name
        if not all(_same(a, b) for (_, a), (_, b) in zip(*leaves, strict=True)):
            return name
    return None


def _same(first: Any, second: Any) -> bool:
    links = [getattr(value, "link", None) for value in (first, second)]
    if links != [None, None]:
        return links[0] == links[1]
    bands = [band_of(mask) if isinstance(mask, CausalMask) else None for mask in (first, second)]
    if None not in bands:
        return (first.shape, str(bands[0])) == (second.shape, str(bands[1]))
    if isinstance(first, mx.array) and isinstance(second, mx.array):
        same = (first.shape, first.dtype) == (second.shape, second.dtype)
        return same and mx.array_equal(first, second, equal_nan=True).item()
    plain = (bool, int, float, str, type(None))
    kinds = [int if isinstance(value, Position) else type(value) for value in (first, second)]
    return kinds[0] is kinds[1] and (not isinstance(first, plain) or first == second)


def all_leaves(value: Any) -> list:
    """All values in nested arguments, including the attributes of objects."""
    leaves = [leaf for _, leaf in tree_flatten(value, is_leaf=_is_module)]
    inside = [vars(leaf) for leaf in leaves if hasattr(leaf, "__dict__")]
    return leaves + [leaf for _, leaf in tree_flatten(inside, is_leaf=_is_module)]


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def identity(block: nn.Module) -> list:
    """The identities of all arrays and attributes of a block."""
    arrays = [(name, id(box[key])) for name, (box, key) in array_slots(block).items()]
    plain = [(path, key, id(v)) for path, m in block.named_modules() for key, v in vars(m).items()]
    return arrays + plain


def has_nan(value: Any) -> bool:
    """Whether a value is an array with NaN, and not what an earlier block returned as it is."""
    if isinstance(value, Linked) and value.link is not None:
        return False
    return (
        isinstance(value, mx.array)
        and mx.issubdtype(value.dtype, mx.floating)
        and bool(mx.isnan(value).any().item())
    )
