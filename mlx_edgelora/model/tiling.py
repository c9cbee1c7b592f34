"""Which blocks can be computed a part of their tokens at a time: tried, not assumed."""

from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.model.attention import masks_known
from mlx_edgelora.model.blocks import BlockList, signature
from mlx_edgelora.model.labelled import TOLERANCES, TRIAL_SHAPE, TRIAL_WINDOW, _unsuited
from mlx_edgelora.model.masks import banded
from mlx_edgelora.model.parts import BlockParts, Picked, Place, Span, mask_at, tokens_at
from mlx_edgelora.model.sources import WeightSource
from mlx_edgelora.model.trial import Compute, trial_of
from mlx_edgelora.model.walkable import MODEL_ERRORS

# Of a row of the trial: spans, and single tokens.
TRIAL_PLACES: list[Place] = [
    Span(0, 3),
    Span(3, 7),
    Picked(0, np.array([0, 2, 3], np.int32)),
    Picked(1, np.array([4, 5, 6], np.int32)),
]
# Of each row: a small one sees what a block adds, a large one sees positions without a norm.
TRIAL_SCALES = (0.01, 1.0)


class Tileable(NamedTuple):
    """Whether a block can be computed by tiles of tokens, why not, and whether in halves.

    Attributes:
        branches: see `BlockParts`; None where the block is no such sum.
        keys: how many numbers keys, or values, of a token are, the larger of the two.
    """

    possible: bool
    reason: str = ""
    branches: tuple[str, str] | None = None
    keys: int = 0


class Tiling:
    """Tells of each block of a model whether it can be computed by tiles of tokens.

    Args:
        blocks: the model's blocks; they passed `check_walk`.
        weights: where the blocks' arrays come from; one block of each kind is read some times.
    """

    def __init__(self, blocks: BlockList, weights: WeightSource) -> None:
        self._blocks, self._weights = blocks, weights
        self._calls: list[tuple] | None = None
        self._found: dict[str, Tileable] = {}

    def of(self, index: int) -> Tileable:
        """Whether block `index` can be; not inside an intercepted call.

        The first call for a block of its kind makes a trial: it runs the block
        on 14 tokens, whole and by parts, and reads it each time.
        """
        block = self._blocks.blocks[index]
        if dropping(block):  # asked anew: it goes on and off with the training mode
            return Tileable(False, "dropout would draw other masks for parts of the tokens")
        if self._calls is None:
            self._calls = block_calls(self._blocks)
        _, args, kwargs = self._calls[index]
        key = signature(block) + repr([type(value) for value in (*args, *kwargs.values())])
        if key not in self._found:
            self._found[key] = self._trial(index)
        return self._found[key]

    def summary(self) -> str:
        """In words, over all blocks."""
        found = [self.of(index) for index in range(len(self._blocks))]
        reasons = sorted({choice.reason for choice in found if not choice.possible})
        count = sum(choice.possible for choice in found)
        return f"{count} of {len(found)} blocks" + (f" ({'; '.join(reasons)})" if reasons else "")

    def _trial(self, index: int) -> Tileable:
        block = self._blocks.blocks[index]
        compute = trial_of(block, self._weights, index)
        try:
            calls = list(_trials(block, *self._calls[index]))
            for x, parts in calls:
                if reason := _disagreement(x, parts, compute):
                    return Tileable(False, reason)
            x, parts = calls[0]
            asked = parts.before(x, Span(0, TRIAL_SHAPE[1]))  # for its shapes: never computed
            keys = max(a.shape[1] * a.shape[3] for a in (asked.k, asked.v))
        except (*MODEL_ERRORS, AssertionError) as error:
            reason = f"a block cannot be called for parts of its tokens: {error}"
            return Tileable(False, reason)
        return Tileable(True, branches=_branches(calls, compute), keys=keys)


def _branches(calls: list[tuple[mx.array, BlockParts]], compute: Compute) -> tuple[str, str] | None:
    """The children of a block that is a sum of two branches, one after the other; tried."""
    _, parts = calls[0]
    children = [name for name, child in parts.block.items() if _multiplies(child)]
    for pair in permutations(children, 2):
        halves = [(x, p.with_branches(pair)) for x, p in calls]
        try:
            if not any(_disagreement(x, p, compute) for x, p in halves):
                return pair
        except (*MODEL_ERRORS, AssertionError):
            continue
    return None


def _multiplies(child: object) -> bool:
    """Whether a child of a block holds a matrix."""
    if not isinstance(child, nn.Module):
        return False
    return any(value.ndim > 1 for _, value in tree_flatten(child.parameters()))


def dropping(module: nn.Module) -> bool:
    """Whether a layer of dropout is at work in a module."""
    return any(
        isinstance(layer, nn.Dropout) and layer.training and layer._p_1 < 1
        for layer in module.modules()
    )


def block_calls(blocks: BlockList) -> list[tuple]:
    """What the model calls each block with on the tokens of the trial; nothing is computed."""
    calls: list[tuple] = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        calls.append(
            (mx.random.normal(x.shape, key=mx.random.key(index)).astype(x.dtype), args, kwargs)
        )
        return x

    with blocks.intercepted(record), masks_known():
        blocks.model(mx.zeros(TRIAL_SHAPE, mx.int32))
    return calls


def _trials(block: nn.Module, x: mx.array, args: tuple, kwargs: dict) -> Iterator[tuple]:
    """The call at an input of one size in each row, and under a window: long texts may have one."""
    parts = BlockParts(block, args, kwargs)
    call = parts.bind(x)
    if reason := _unsuited(call):
        raise ValueError(reason)
    masks = [call.arguments.get("mask")]
    if isinstance(masks[0], str):
        masks.append(banded(range(TRIAL_SHAPE[1]), TRIAL_SHAPE[1], TRIAL_WINDOW))
    scaled = mx.array(TRIAL_SCALES, x.dtype)[:, None, None] * x
    for mask in masks:
        yield scaled, parts.with_mask(mask)


def _disagreement(x: mx.array, parts: BlockParts, compute: Compute) -> str | None:
    """How the parts, or the halves, differ from the whole, if they do."""
    (whole,) = compute(lambda: [parts.whole(x)])
    keys, values = compute(lambda: _keys_and_values(x, parts))
    for place in TRIAL_PLACES:
        (got,) = compute(lambda place=place: [_computed_at(x, parts, place, keys, values)])
        got, expected, before = (
            value.astype(mx.float32)
            for value in (got, tokens_at(whole, 0, place), tokens_at(x, 0, place))
        )
        off = mx.linalg.norm(got - expected, axis=-1)
        added = mx.linalg.norm(expected - before, axis=-1)
        difference = (off / added).max().item()
        if not difference <= TOLERANCES[x.dtype]:  # NaN is no agreement
            return f"computed by parts a block differs by {difference:.1e} of its norm"
    return None


def _keys_and_values(x: mx.array, parts: BlockParts) -> list[mx.array]:
    """Of all tokens, by tiles."""
    asked = [parts.before(tokens_at(x, 0, span), span) for span in TRIAL_PLACES[:2]]
    return [mx.concatenate([a[i] for a in asked], axis=2) for i in (1, 2)]


def _computed_at(
    x: mx.array, parts: BlockParts, place: Place, keys: mx.array, values: mx.array
) -> mx.array:
    """What the block, or its halves one after the other, make of the tokens at a place."""
    mine = tokens_at(x, 0, place)
    ask = parts.before(mine, place)
    row = slice(None) if isinstance(place, Span) else slice(place.row, place.row + 1)
    _, mask = mask_at(ask.mask, place, Span(0, keys.shape[2]))
    attended = mx.fast.scaled_dot_product_attention(
        ask.q, keys[row], values[row], scale=ask.scale, mask=mask, sinks=ask.sinks
    )
    if parts.branches is None:
        return parts.after(mine, place, attended)
    return parts.rest(parts.middle(mine, place, attended), place)
