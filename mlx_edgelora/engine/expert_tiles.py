"""Whether the experts of a block are computed for all tiles of a pass at once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.experts import calls_experts, expert_picks
from mlx_edgelora.engine.context import Context
from mlx_edgelora.engine.expert_gradients import ExpertTiles, reads_experts


def expert_tiles(
    context: Context, index: int, before: Callable[[], list[mx.array]] = list
) -> ExpertTiles | None:
    """The experts of a block for all its tiles; None if each tile computes its own, or has none.

    Args:
        context: of the pass.
        index: index of the block.
        before: what later tiles read of a tile; it must not depend on experts.
    """
    functions = context.functions
    if not context.slots.can_open or not calls_experts(functions.blocks.blocks[index]):
        return None
    key = functions.signature(index)
    if (key, "before") not in functions.affine:
        functions.affine[key, "before"] = not reads_experts(before)
    if not functions.affine[key, "before"]:
        return None
    return ExpertTiles(context.slots, functions.affine, key)


def expert_slots(block: nn.Module, itemsize: int) -> int:
    """Slots that the experts of a block need for each tile, after a call of the block.

    Args:
        block: the block.
        itemsize: bytes of an entry of a hidden state.
    """
    k = expert_picks(block)
    # What each token gives to its experts and gets of each, and a float32 gradient.
    return k and 1 + k + -(-4 // itemsize)


def given_experts(experts: ExpertTiles | None, tile: int) -> AbstractContextManager[None]:
    """Let the experts of a tile return what was computed for all tiles, if it was."""
    return nullcontext() if experts is None else experts.given(tile)
