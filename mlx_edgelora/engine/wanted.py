"""The wanted rows of a block's output, tile by tile."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.engine.functions import RowIndices, rows_of
from mlx_edgelora.engine.hidden import Hidden, Slots


class WantedRows:
    """Where the wanted rows of a pass are in its tiles.

    Args:
        rows: int [n], ascending, of the B * T tokens; None for all.
        spans: the tiles.
    """

    def __init__(self, rows: RowIndices, spans: Sequence[TokenSpan]) -> None:
        self.all = rows is None
        self._spans = spans
        self._places: list[mx.array | None] = []
        self._order: list[np.ndarray] = []  # their places among all wanted ones
        if self.all:
            return
        row, position = np.divmod(np.asarray(rows), spans[-1].stop)
        for span in spans:
            inside = np.flatnonzero((position >= span.start) & (position < span.stop))
            own = row[inside] * (span.stop - span.start) + position[inside] - span.start
            self._places.append(mx.array(own) if own.size else None)
            self._order.append(inside)

    def at(self, number: int) -> mx.array | None:
        """The wanted rows of a tile, int [m] of its B * t tokens; None if there are none."""
        return self._places[number]

    def has(self, number: int) -> bool:
        """Whether rows of a tile are wanted."""
        return self.all or self._places[number] is not None

    def by_tiles(self, dy: Hidden, slots: Slots) -> Hidden:
        """The gradient of the block's output in the store, tile by tile; `dy` is released.

        Args:
            dy: in tiles, or of the wanted rows [1, n, D] in memory if these are not all.
            slots: where tiles are put.

        Returns:
            Tiles; of the wanted rows [1, m, D] if these are not all. There is none for a tile
            without wanted rows.
        """
        if self.all:
            return dy
        whole, stored = dy.whole(), Hidden.tiles(self._spans, slots)
        dy.forget()
        for number, order in enumerate(self._order):
            if self.has(number):
                piece = whole[:, mx.array(order)]
                mx.eval(piece)
                stored.put(number, piece)
        return stored

    def cotangent(self, dy: Hidden, number: int) -> mx.array | None:
        """A tile of `by_tiles`; None for a tile without wanted rows."""
        return dy.tile(number) if self.has(number) else None

    def of_tile(self, tile: mx.array, number: int) -> mx.array:
        """The wanted rows of a tile's output [B, t, D], of a tile that has some."""
        return tile if self.all else rows_of(tile, self.at(number))

    def joined(self, out: Hidden) -> Hidden:
        """The wanted rows [1, n, D] in memory, of tiles in the store, which are released."""
        tiles = [out.tile(number) for number in range(len(self._spans)) if self.has(number)]
        out.forget()
        return Hidden(self.in_order(tiles))

    def in_order(self, pieces: list[mx.array]) -> mx.array:
        """Join the outputs of the tiles, [1, m, D] each, in the order of the wanted rows."""
        whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
        order = np.concatenate(self._order)
        if (np.diff(order) < 0).any():
            whole = whole[:, mx.array(np.argsort(order))]
        mx.eval(whole)
        return whole
