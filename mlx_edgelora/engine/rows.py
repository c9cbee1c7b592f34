"""Rows of matrices that come tile by tile and are used in any order: in memory, or in the store."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_edgelora.engine.hidden import Slots
from mlx_edgelora.layers.experts import add_rows, array_of, view_of


class HeldRows:
    """Rows in memory, of tiles that are appended; see `layers.experts.Rows`.

    Memory: all rows; tiles that are appended are not copied.

    Args:
        width: entries of a row.
        dtype: of the rows.
    """

    def __init__(self, width: int, dtype: mx.Dtype) -> None:
        self.width, self.dtype = width, dtype
        self._starts, self._stop = [], 0
        self._views: list[np.ndarray] = []  # one or several for each tile
        self._tiles: list[range] = []  # the numbers of these
        self._arrays: list[mx.array] = []

    def append(self, array: mx.array) -> None:
        """Add the rows of a tile, [n, width], evaluated."""
        self._tiles.append(range(len(self._views), len(self._views) + 1))
        self._arrays.append(array)
        self._add(view_of(array))

    def extend(self, count: int, clear: bool = True) -> None:
        """Add rows as a tile: zeros, or whatever is there unless they must be `clear`."""
        zeros = mx.zeros((count, self.width), self.dtype)
        mx.eval(zeros)
        self.append(zeros)

    def tile(self, number: int) -> mx.array:
        """The rows of a tile, [n, width], evaluated."""
        return self._arrays[number]

    def take(self, rows: np.ndarray) -> mx.array:
        """See `Rows`."""
        found = np.empty((rows.size, self.width), view_of(mx.zeros(0, self.dtype)).dtype)
        for place, at, inside in self._found(rows):
            found[at] = self._views[place][inside]
            self._touched(place, read=self._bytes(at))
        return array_of(found, self.dtype)

    def put(self, rows: np.ndarray, values: mx.array) -> None:
        """See `Rows`."""
        given = view_of(values)
        for place, at, inside in self._found(rows):
            self._views[place][inside] = given[at]
            self._touched(place, written=self._bytes(at))

    def add(self, rows: np.ndarray, values: mx.array) -> None:
        """See `Rows`."""
        given = view_of(values)
        for place, at, inside in self._found(rows):
            add_rows(self._views[place], inside, given[at])
            self._touched(place, self._bytes(at), self._bytes(at))

    def forget(self) -> None:
        """Release all rows."""
        self._views.clear()
        self._arrays.clear()

    def _bytes(self, rows: np.ndarray) -> int:
        return rows.size * self.width * self.dtype.size

    def _add(self, view: np.ndarray) -> None:
        self._views.append(view)
        self._starts.append(self._stop)
        self._stop += view.shape[0]

    def _found(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each piece that has some of these rows, which of them, and their places in it."""
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places):
            at = np.flatnonzero(places == place)
            yield int(place), at, rows[at] - self._starts[place]

    def _touched(self, place: int, read: int = 0, written: int = 0) -> None:
        """Memory of a piece was read or written."""


class StoredRows(HeldRows):
    """As `HeldRows`, in slots of the store, as many as the rows need.

    Memory: that of the store; its pages are released after each use.

    Args:
        width, dtype: as for `HeldRows`.
        slots: slots of the store; `can_open` must be true.
    """

    def __init__(self, width: int, dtype: mx.Dtype, slots: Slots) -> None:
        super().__init__(width, dtype)
        self._slots, self._numbers = slots, []
        self._rows = max(1, slots.nbytes // (width * dtype.size))  # of a slot

    def append(self, array: mx.array) -> None:
        """As in `HeldRows`; the rows are copied."""
        self.extend(array.shape[0], clear=False)
        first, given = 0, view_of(array)
        for place in self._tiles[-1]:
            view = self._views[place]
            view[...] = given[first : first + view.shape[0]]
            first += view.shape[0]
            self._touched(place, written=view.nbytes)

    def extend(self, count: int, clear: bool = True) -> None:
        """See `HeldRows`."""
        before = len(self._views)
        kind = view_of(mx.zeros(0, self.dtype)).dtype
        for start in range(0, count, self._rows):
            shape = min(self._rows, count - start), self.width
            slot, memory = self._slots.open(shape[0] * shape[1] * self.dtype.size)
            self._numbers.append(slot)
            if clear:
                memory[:] = 0
            self._add(memory.view(kind).reshape(shape))
            self._touched(len(self._numbers) - 1)
        self._tiles.append(range(before, len(self._views)))

    def tile(self, number: int) -> mx.array:
        """See `HeldRows`; a copy."""
        places = self._tiles[number]
        pieces = [self._views[place] for place in places]
        found = array_of(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), self.dtype)
        mx.eval(found)
        for place in places:
            self._touched(place, read=self._views[place].nbytes)
        return found

    def forget(self) -> None:
        """Release all rows."""
        super().forget()
        for slot in self._numbers:
            self._slots.release(slot)
        self._numbers = []

    def _touched(self, place: int, read: int = 0, written: int = 0) -> None:
        self._slots.store.touched(self._numbers[place], read, written)
