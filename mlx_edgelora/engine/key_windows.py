"""The backward of a block by tiles, with the sums of dK and dV of some tokens at a time.

Tiles come from the last to the first, and each adds to dK and dV of all tokens before it. Those of
a window of tokens are summed while its tiles are computed. What earlier tokens get from these tiles
is computed when their window has come, from queries, gradients and softmax of each tile, which wait
in the store (`layers/key_sums.py`).

Memory: the sums of one window, and one tile of what waits. Time: for each tile, the scores of the
windows before its own once more.
"""

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlx_edgelora.blocks.parts import BlockParts
from mlx_edgelora.engine.context import Context
from mlx_edgelora.layers.grid import add_to_keys
from mlx_edgelora.layers.key_sums import KeyCall

if TYPE_CHECKING:
    from mlx_edgelora.engine.tiled_backward import TiledBackward

# Slots that a tile needs until the tokens before it have got their gradients.
CALL_SLOTS = 3


class _StoredCall(NamedTuple):
    """A `KeyCall` of a tile, with the slots of its arrays."""

    tile: int
    call: KeyCall
    slots: list[int]


class KeyWindows:
    """The windows of one backward of a block with a causal mask.

    Args:
        context: of the block.
        parts: of the block.
        tokens: tokens of a window, at least those of a tile.

    Attributes:
        window: the first token of the present window, and the first after it.
    """

    def __init__(self, context: Context, parts: BlockParts, tokens: int) -> None:
        self._context, self._parts, self._tokens = context, parts, tokens
        self.window = (context.spans[-1].stop, context.spans[-1].stop)
        self._calls: list[_StoredCall] = []

    def reach(self, number: int, visit: "TiledBackward") -> None:
        """Move the window if a tile is before it, and add what later tiles give to its tokens."""
        spans = self._context.spans
        if spans[number].start >= self.window[0]:
            return
        stop = spans[number].stop
        starts = [span.start for span in spans[:number] if stop - span.start <= self._tokens]
        self.window = min([spans[number].start, *starts]), stop
        if visit.key_value_sums is None:
            return
        visit.key_value_sums.window = self.window
        waiting, self._calls = self._calls, []
        for stored in waiting:
            self._add(stored, visit)

    def keep_calls(self, number: int, visit: "TiledBackward") -> None:
        """Store what a tile leaves for tokens before the window."""
        if visit.key_value_sums is None:
            return
        calls, visit.key_value_sums.calls = visit.key_value_sums.calls, []
        for call in calls:
            slots = list(map(self._context.slots.put, call.arrays))
            self._calls.append(_StoredCall(number, call._replace(arrays=()), slots))

    def _add(self, stored: _StoredCall, visit: "TiledBackward") -> None:
        """Add what a tile gives to the tokens of the window."""
        spans, slots = self._context.spans, self._context.slots
        seen = self._parts.visible_keys(spans[stored.tile], spans[-1].stop)
        is_last = seen.start >= self.window[0]
        if seen.start < self.window[1]:
            arrays = tuple(slots.store.take(slot, keep=True) for slot in stored.slots)
            keys = [array[:, :, seen.start : seen.stop] for array in visit.key_values]
            sums = visit.sums_from(seen)
            add_to_keys(stored.call._replace(arrays=arrays), *keys, sums)
            mx.eval(sums.arrays)
        if is_last:
            for slot in stored.slots:
                slots.release(slot)
        else:
            self._calls.append(stored)
