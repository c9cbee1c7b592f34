"""Hidden states between segments: tiles of tokens, in memory or in a store."""

import copy
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.measure.profile import phase
from mlx_edgelora.storage.stores import ActivationStore


def spans_of(tokens: int, size: int) -> list[TokenSpan]:
    """Cut the tokens of a row into tiles of nearly one length, `size` at most."""
    count = -(-tokens // size)
    step = -(-tokens // count)
    return [TokenSpan(start, min(start + step, tokens)) for start in range(0, tokens, step)]


class Slots:
    """Allocates the slots of a store for one pass.

    Args:
        store: its contents are discarded.
        count: number of slots in use at a time.
        nbytes: size of the largest expected array.
    """

    def __init__(self, store: ActivationStore, count: int, nbytes: int) -> None:
        self.store = store
        self.nbytes = nbytes
        if count:  # a file of no bytes cannot be mapped
            store.reserve(count, nbytes)
        self._free = list(range(count))[::-1]
        self._count = count

    def put(self, array: mx.array) -> int:
        """Store an evaluated array and return its slot."""
        slot = self._take_free()
        with phase("spill"):
            self.store.put(slot, array)
        return slot

    @property
    def can_open(self) -> bool:
        """Whether slots can be read and written in place: those of a file can."""
        return hasattr(self.store, "open")

    def open(self, nbytes: int) -> tuple[int, np.ndarray]:
        """A slot and its memory, [nbytes] uint8, to be read and written in place."""
        slot = self._take_free()
        return slot, self.store.open(slot, nbytes)

    def _take_free(self) -> int:
        if not self._free:  # more arrays than expected: the store grows
            self._free.append(self._count)
            self._count += 1
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Discard the array of a slot."""
        self.store.forget(slot)
        self._free.append(slot)


class Hidden:
    """Hidden states [B, T, D], or their gradient; also another array with an axis of tokens.

    One array in memory (`Hidden(array)`), or tiles that are put into a store one by one
    (`Hidden.tiles`). Memory: the array, or that of the store.

    Args:
        array: all tokens, evaluated.
        axis: axis of the tokens.
    """

    def __init__(self, array: mx.array, axis: int = 1) -> None:
        self._array: mx.array | None = array
        self._axis = axis
        self._spans: Sequence[TokenSpan] | None = None
        self._slots: Slots | None = None
        self._numbers: list[int | None] = []

    @classmethod
    def tiles(cls, spans: Sequence[TokenSpan], slots: Slots, axis: int = 1) -> "Hidden":
        """Create empty hidden states, to be filled with tiles of these spans."""
        made = cls(None, axis)
        made._spans, made._slots, made._numbers = spans, slots, [None] * len(spans)
        return made

    def put(self, number: int, tile: mx.array) -> None:
        """Store an evaluated tile, replacing an earlier one."""
        if (before := self._numbers[number]) is not None:
            self._slots.release(before)
        self._numbers[number] = self._slots.put(tile)

    def has(self, number: int) -> bool:
        """Whether a tile is stored."""
        return self._numbers[number] is not None

    def tile(self, number: int) -> mx.array:
        """Return one tile; writing into the result does not change the stored tile."""
        return copy.copy(self._slots.store.take(self._numbers[number], keep=True))

    def cut(self, spans: Sequence[TokenSpan], slots: Slots) -> "Hidden":
        """The same hidden states in tiles of these spans; an array in memory is released."""
        if self._array is None and self._spans == spans:
            return self
        array, made = self.whole(), Hidden.tiles(spans, slots, self._axis)
        self.forget()
        for number, span in enumerate(spans):
            made.put(number, _own(array, span, self._axis))
        return made

    def whole(self) -> mx.array:
        """All tokens; writing into the result does not change the stored ones."""
        if self._array is not None:
            return copy.copy(self._array)  # a new array object on the same memory
        tiles = [self.tile(number) for number in range(len(self._numbers))]
        array = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=self._axis)
        mx.eval(array)
        return array

    def prefetch(self) -> None:
        """Start reading the hidden states, if they are one tile."""
        if len(self._numbers) == 1 and self._numbers[0] is not None:
            self._slots.store.prefetch(self._numbers[0])

    def forget(self) -> None:
        """Release all tiles."""
        self._array = None
        for number, slot in enumerate(self._numbers):
            if slot is not None:
                self._slots.release(slot)
                self._numbers[number] = None


def tokens_of(array: mx.array, span: TokenSpan, axis: int) -> mx.array:
    """The tokens of a span, lazy."""
    return array[(*[slice(None)] * axis, slice(span.start, span.stop))]


def _own(array: mx.array, span: TokenSpan, axis: int) -> mx.array:
    """The tokens of a span, copied unless they are the whole array."""
    if span.stop - span.start == array.shape[axis]:
        return array
    tile = mx.contiguous(tokens_of(array, span, axis))
    mx.eval(tile)
    return tile
