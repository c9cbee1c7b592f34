"""Which blocks can be computed a part of their tokens at a time: tried, not assumed."""

from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.layers.fused import is_floating
from mlx_edgelora.model.attention import masks_known
from mlx_edgelora.model.blocks import BlockList, array_slots, bound, described, signature
from mlx_edgelora.model.labelled import TOLERANCES, TRIAL_SHAPE, TRIAL_WINDOW, _unsuited
from mlx_edgelora.model.masks import band_of, banded
from mlx_edgelora.model.parts import (
    BlockParts,
    Picked,
    Place,
    Span,
    mask_at,
    tokens_at,
)
from mlx_edgelora.model.sources import WeightSource
from mlx_edgelora.model.trial import Compute, trial_of
from mlx_edgelora.model.walkable import MODEL_ERRORS, looks_at_values, watched

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
        keys: how many numbers keys, or values, of a token are, the larger of the two; of a
            block that is cut at its cache, what it gives the cache.
        through_cache: see `BlockParts`.
    """

    possible: bool
    reason: str = ""
    branches: tuple[str, str] | None = None
    keys: int = 0
    through_cache: bool = False


class Tiling:
    """Tells of each block of a model whether it can be computed by tiles of tokens.

    Args:
        blocks: the model's blocks; they passed `check_walk`.
        weights: where the blocks' arrays come from; one block of each kind is read some times.
        like: of other blocks, some of which are these: what was tried there is not tried again.
    """

    def __init__(
        self, blocks: BlockList, weights: WeightSource, like: "Tiling | None" = None
    ) -> None:
        self._blocks, self._weights = blocks, weights
        self._calls: list[tuple] | None = None
        self._found: dict[str, Tileable] = {} if like is None else like._found

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
        key = signature(block) + described(args, kwargs)
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
        compute, reasons = trial_of(block, self._weights, index), []
        for through_cache in (False, True):
            try:
                calls = list(_trials(block, *self._calls[index], through_cache))
                reason = next(filter(None, (_disagreement(*call, compute) for call in calls)), "")
                if not reason and through_cache and _depends_on_length(*calls[0]):
                    reason = "what a block computes depends on how long the text is"
                if not reason:
                    x, parts = calls[0]
                    kept = parts.kept(x, Span(0, TRIAL_SHAPE[1]))  # for its shapes: never computed
                    keys = max(array.shape[1] * array.shape[3] for array in kept)
                    return Tileable(True, "", _branches(calls, compute), keys, through_cache)
            except MODEL_ERRORS as error:
                reason = f"a block cannot be called for parts of its tokens: {error}"
            reasons.append(reason)
        return Tileable(False, reasons[0])


def _depends_on_length(x: mx.array, parts: BlockParts) -> bool:
    """Whether a block decides by the position of its tokens what it computes, in Python.

    As rotary frequencies that change behind some length do: a trial on a few tokens would not see
    it. Picked tokens, whose positions are arrays, show it where a block is cut at attention.
    """
    some = Span(0, 3)
    mine = tokens_at(x, 0, some)
    return looks_at_values(lambda offset: parts.cached(mine, some, offset), [mx.array(3)])


def _branches(calls: list[tuple[mx.array, BlockParts]], compute: Compute) -> tuple[str, str] | None:
    """The children of a block that is a sum of two branches, one after the other; tried."""
    _, parts = calls[0]
    children = [name for name, child in parts.block.items() if _multiplies(child)]
    for pair in permutations(children, 2):
        halves = [(x, p.cut(pair, p.through_cache)) for x, p in calls]
        try:
            if not any(_disagreement(x, p, compute) for x, p in halves):
                return pair
        except MODEL_ERRORS:
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


def _trials(
    block: nn.Module, x: mx.array, args: tuple, kwargs: dict, through_cache: bool
) -> Iterator[tuple[mx.array, BlockParts]]:
    """The call at an input of one size in each row, and under a window: long texts may have one."""
    parts = BlockParts(block, args, kwargs, None, through_cache)
    call = parts.bind(x)
    if reason := _unsuited(call):
        raise ValueError(reason)
    mask = call.arguments.get("mask")
    masks, window = [mask], banded(range(TRIAL_SHAPE[1]), TRIAL_SHAPE[1], TRIAL_WINDOW)
    if band_of(mask) is not None:
        masks.append(window)
    scaled = mx.array(TRIAL_SCALES, x.dtype)[:, None, None] * x
    for mask in masks:
        yield scaled, parts.with_mask(mask)


def _disagreement(x: mx.array, parts: BlockParts, compute: Compute) -> str | None:
    """How the parts, or the halves, differ from the whole, if they do."""
    if not parts.through_cache and _mask_is_computed(x, parts):
        return "a block adds a mask to its scores that depends on its input"
    (whole,) = compute(lambda: [parts.whole(x)])
    keys, values = compute(lambda: _keys_and_values(x, parts))
    places = [p for p in TRIAL_PLACES if isinstance(p, Span) or not parts.through_cache]
    for place in places:
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


def _mask_is_computed(x: mx.array, parts: BlockParts) -> bool:
    """Whether a gradient passes through what a block gives attention beside q, k and v.

    That is taken for constants where attention is taken away from the block.
    """
    reached: list[bool] = []
    watch = watched(lambda: reached.append(True))
    trained = dict(tree_flatten(parts.block.trainable_parameters()))
    slots = array_slots(parts.block)

    def constants(x: mx.array, *values: mx.array) -> list[mx.array]:
        seen = {name: watch(value) for name, value in zip(trained, values, strict=True)}
        with bound(slots, seen):
            asked = parts.before(watch(x), Span(0, x.shape[1]))
        floats = [a for a in (asked.mask, asked.sinks) if is_floating(a)]
        return [a.astype(mx.float32).sum() for a in floats] or [mx.array(0.0)]

    # Only the graph is built: nothing is computed, no weights are read.
    every = list(range(1 + len(trained)))
    mx.grad(lambda *arrays: sum(constants(*arrays)), argnums=every)(x, *trained.values())
    return bool(reached)


def _keys_and_values(x: mx.array, parts: BlockParts) -> list[mx.array]:
    """Of all tokens, by tiles; or what they give the cache."""
    pairs = [parts.kept(tokens_at(x, 0, span), span) for span in TRIAL_PLACES[:2]]
    return [mx.concatenate(both, axis=2) for both in zip(*pairs, strict=True)]


def _computed_at(
    x: mx.array, parts: BlockParts, place: Place, keys: mx.array, values: mx.array
) -> mx.array:
    """What the block, or its halves one after the other, make of the tokens at a place."""
    mine = tokens_at(x, 0, place)
    if parts.through_cache:
        seen = parts.seen(place, keys.shape[2])
        cached = [array[:, :, seen.start : seen.stop] for array in (keys, values)]
        out = parts.finished(mine, place, seen, cached)
        return out if parts.branches is None else parts.rest(out, place)
    ask = parts.before(mine, place)
    row = slice(None) if isinstance(place, Span) else slice(place.row, place.row + 1)
    _, mask = mask_at(ask.mask, place, Span(0, keys.shape[2]))
    attended = mx.fast.scaled_dot_product_attention(
        ask.q, keys[row], values[row], scale=ask.scale, mask=mask, sinks=ask.sinks
    )
    if parts.branches is None:
        return parts.after(mine, place, attended)
    return parts.rest(parts.middle(mine, place, attended), place)
