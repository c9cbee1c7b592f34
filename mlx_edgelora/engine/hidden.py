"""Hidden states on their way: tiles of tokens, in memory or in a store."""

import copy
from collections.abc import Sequence

import mlx.core as mx

from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.measure.profile import phase
from mlx_edgelora.storage.stores import ActivationStore


def spans_of(tokens: int, size: int) -> list[TokenSpan]:
    """Cut the tokens of a row into tiles of nearly one length, `size` at most."""
    count = -(-tokens // size)
    step = -(-tokens // count)
    return [TokenSpan(start, min(start + step, tokens)) for start in range(0, tokens, step)]


class Slots:
    """Hands out the slots of a store, for one pass.

    Args:
        store: forgets what it holds.
        count: slots that are in use at a time.
        nbytes: the largest array, as far as it is known.
    """

    def __init__(self, store: ActivationStore, count: int, nbytes: int) -> None:
        self.store = store
        if count:  # a file of no bytes cannot be mapped
            store.reserve(count, nbytes)
        self._free = list(range(count))[::-1]
        self._count = count

    def put(self, array: mx.array) -> int:
        """Keep an evaluated array; gives its slot."""
        if not self._free:  # more than was announced: the store makes room
            self._free.append(self._count)
            self._count += 1
        slot = self._free.pop()
        with phase("spill"):
            self.store.put(slot, array)
        return slot

    def release(self, slot: int) -> None:
        """Forget the array of a slot."""
        self.store.forget(slot)
        self._free.append(slot)


class Hidden:
    """Hidden states [B, T, D], or their gradient.

    Made of one array that is in memory (`Hidden(array)`), or empty and then filled tile by tile
    in a store (`Hidden.tiles`). Memory: the array, or what the store takes.

    Args:
        array: all tokens, evaluated.
    """

    def __init__(self, array: mx.array) -> None:
        self._array: mx.array | None = array
        self._spans: Sequence[TokenSpan] | None = None
        self._slots: Slots | None = None
        self._numbers: list[int | None] = []

    @classmethod
    def tiles(cls, spans: Sequence[TokenSpan], slots: Slots) -> "Hidden":
        """Nothing yet, for tiles of these tokens."""
        made = cls(None)
        made._spans, made._slots, made._numbers = spans, slots, [None] * len(spans)
        return made

    def put(self, number: int, tile: mx.array) -> None:
        """Keep an evaluated tile in place of the one that was there."""
        if (before := self._numbers[number]) is not None:
            self._slots.release(before)
        self._numbers[number] = self._slots.put(tile)

    def tile(self, number: int) -> mx.array:
        """Give one tile; it stays, whatever is written into what is given."""
        return copy.copy(self._slots.store.take(self._numbers[number], keep=True))

    def cut(self, spans: Sequence[TokenSpan], slots: Slots) -> "Hidden":
        """The same in tiles of these tokens; what was one array in memory is let go."""
        if self._array is None and self._spans == spans:
            return self
        array, made = self.whole(), Hidden.tiles(spans, slots)
        self.forget()
        for number, span in enumerate(spans):
            made.put(number, _own(array, span))
        return made

    def whole(self) -> mx.array:
        """All tokens; they stay, whatever is written into what is given."""
        if self._array is not None:
            return copy.copy(self._array)  # of the description: the memory is the same
        tiles = [self.tile(number) for number in range(len(self._numbers))]
        array = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)
        mx.eval(array)
        return array

    def prefetch(self) -> None:
        """Begin to bring back what is one tile."""
        if len(self._numbers) == 1 and self._numbers[0] is not None:
            self._slots.store.prefetch(self._numbers[0])

    def forget(self) -> None:
        """Let go of all of it."""
        self._array = None
        for number, slot in enumerate(self._numbers):
            if slot is not None:
                self._slots.release(slot)
                self._numbers[number] = None


def _own(array: mx.array, span: TokenSpan) -> mx.array:
    """The tokens of a span in memory of their own."""
    if span.stop - span.start == array.shape[1]:
        return array
    tile = mx.contiguous(array[:, span.start : span.stop])
    mx.eval(tile)
    return tile
