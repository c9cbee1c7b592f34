"""Trials of a block on a few tokens, in less memory than the block itself."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.model.blocks import array_slots, bound
from mlx_edgelora.model.sources import WeightSource

# Evaluates what a function makes of the block's call.
Compute = Callable[[Callable[[], Sequence[mx.array]]], Sequence[mx.array]]


def trial_of(block: nn.Module, weights: WeightSource, index: int) -> Compute:
    """Something that computes with a block's arrays bound.

    Args:
        block: what is called.
        weights: where its arrays come from; asked anew for every computation.
        index: of the block.

    Returns:
        A function that builds arrays with the weights bound and evaluates them without.
        Memory: streamed weights then belong to one graph alone, which reads a matrix where it
        is multiplied and frees it; bound for good, a block would be in memory whole, which
        no step by halves needs.
    """
    slots = array_slots(block)

    def compute(make: Callable[[], Sequence[mx.array]]) -> Sequence[mx.array]:
        with bound(slots, weights.block(index)):
            arrays = make()
        mx.eval(arrays)
        return arrays

    return compute
