"""Arrays of any size in the slots of a pass."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_edgelora.engine.hidden import Slots


def slots_of(nbytes: int, arrays: int, slot_bytes: int) -> int:
    """Slots that so many arrays of so many bytes together take at most."""
    return arrays + nbytes // max(1, slot_bytes)


class SpilledArrays:
    """Some arrays in the store of a pass, cut into pieces that fit its slots.

    Memory: that of the store; one array more while it is written or read.

    Args:
        slots: slots of the store.
        arrays: evaluated.
    """

    def __init__(self, slots: Slots, arrays: Sequence[mx.array]) -> None:
        self._slots = slots
        self._shapes = [array.shape for array in arrays]
        self._numbers = [self._put(array) for array in arrays]

    def arrays(self) -> list[mx.array]:
        """The arrays, evaluated."""
        found = []
        for shape, numbers in zip(self._shapes, self._numbers, strict=True):
            pieces = [self._slots.store.take(number, keep=True) for number in numbers]
            array = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
            found.append(array.reshape(shape))
            mx.eval(found[-1])
        return found

    def forget(self) -> None:
        """Discard the arrays, once nothing computes with them."""
        for numbers in self._numbers:
            for number in numbers:
                self._slots.release(number)
        self._numbers = []

    def _put(self, array: mx.array) -> list[int]:
        flat, entries = array.reshape(-1), max(1, self._slots.nbytes // array.dtype.size)
        numbers = []
        for start in range(0, flat.size, entries):
            piece = mx.contiguous(flat[start : start + entries])
            mx.eval(piece)
            numbers.append(self._slots.put(piece))
        return numbers
