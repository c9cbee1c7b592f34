"""Try whether a block can be computed by tiles of tokens that append to its caches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_edgelora.blocks.cached_parts import CachedParts
from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.blocks.tracing import depends_on_values
from mlx_edgelora.blocks.visits import VISITS, VisitedCall


class Appended(NamedTuple):
    """What a block appends to its caches.

    Attributes:
        count: number of arrays.
        entries: of a token in all of them.
    """

    count: int
    entries: int


def try_caches(
    compute: Callable, parts: CachedParts, x: mx.array, spans: Sequence[TokenSpan]
) -> tuple[mx.array, mx.array, Appended]:
    """Compute a block whole and by tiles.

    Args:
        compute: calls a function with the block's arrays bound, and evaluates the result.
        parts: the call of the block.
        x: input [B, T, D].
        spans: the tiles.

    Returns:
        The output by tiles and that of the whole block, and what the block appends.

    Raises:
        ValueError: the block appends nothing, or control flow depends on where its tokens are.
    """
    tiles: list[mx.array] = []
    held: list[mx.array] = []
    for span in spans:
        mine = x[:, span.start : span.stop]
        tile, own = compute(parts.tile, mine, span, held)
        if not own:
            raise ValueError("it does not fill its caches")
        again = compute(parts.appended, mine, span, held, len(own))
        if [array.shape for array in again] != [array.shape for array in own]:
            raise ValueError("its caches are filled differently each time")
        held = append(held, own)
        tiles.append(tile)
    first, count = spans[0], len(held)

    def placed(offset: mx.array) -> list[mx.array]:
        with VISITS.handled_by(_nothing):  # a visit must not be traced
            return parts.placed(x[:, : first.stop], first, offset, count)

    if depends_on_values(placed, [mx.array(first.stop)]):
        raise ValueError("what a block computes depends on how long the text is")
    entries = sum(array.shape[1] * array.shape[3] for array in held)
    (whole,) = compute(parts.whole, x)
    return mx.concatenate(tiles, axis=1), whole, Appended(count, entries)


def _nothing(call: VisitedCall) -> mx.array:
    return mx.zeros(call.out_shape, call.x.dtype)


def append(held: list[mx.array], own: list[mx.array]) -> list[mx.array]:
    """Arrays [B, heads, T, n] with those of more tokens behind them."""
    if not held:
        return own
    return [mx.concatenate(pair, axis=2) for pair in zip(held, own, strict=True)]
