"""One forward pass by tiles of tokens, and its backward: hidden states as lists of tiles.

What the model's own loop hands from block to block is then a placeholder that is never
computed; the walk keeps the tiles. Every tile of every block's input has a slot of its own in
the activation store, so that a block's backward reads what it needs when it needs it.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_edgelora.memory.profile import phase
from mlx_edgelora.memory.stores import ActivationStore
from mlx_edgelora.memory.tiles import (
    Slots,
    Sums,
    TiledBlock,
    Used,
    flat_places,
    places_of,
    spans_of,
)
from mlx_edgelora.model.labelled import checked_rows, put_rows, take_rows
from mlx_edgelora.model.parts import BlockParts, Span


class TiledPass:
    """The tiles of one pass, between blocks and on their way into the store and back.

    Args:
        tile_tokens: tokens of a tile, over all rows of the batch.
        x: the first block's input, [B, T, D].
        store: where inputs of blocks wait.
        first: the lowest block whose input is kept.
        blocks: number of blocks.
        halves: whether blocks are computed in halves, and what lies between is kept too.
    """

    def __init__(
        self,
        tile_tokens: int,
        x: mx.array,
        store: ActivationStore,
        first: int,
        blocks: int,
        halves: bool,
    ) -> None:
        self._shape, self._first, self._last = x.shape, first, blocks - 1
        self.spans = spans_of(x.shape[1], max(1, tile_tokens // x.shape[0]))
        self._store = store
        self._hidden = self._split(x)
        self._pieces: list[list[mx.array]] = []
        self._rows: mx.array | None = None
        self._cotangents: list[list[mx.array]] = []
        if first < blocks:
            size = max(tile.nbytes for tile in self._hidden)
            store.reserve((2 if halves else 1) * (blocks - first) * len(self.spans), size)

    def keep(self, index: int) -> None:
        """Put the input of block `index` into the store."""
        with phase("spill", index):
            for number, tile in enumerate(self._hidden):
                self._store.put(self._slot(index, number), tile)

    def tiled(
        self, parts: BlockParts, slots: Slots, used: Used, rows: mx.array | None
    ) -> TiledBlock:
        """A visit of a block by tiles.

        Args:
            parts: the block's call.
            slots: where the block's arrays hang.
            used: see `TiledBlock`.
            rows: int [n], of the batch * tokens rows those it is computed for; None for all.
        """
        batch, tokens, _ = self._shape
        indices = None if rows is None else checked_rows(rows, batch * tokens)
        return TiledBlock(parts, slots, self.spans, places_of(self.spans, indices, tokens), used)

    def forward(self, block: TiledBlock) -> None:
        """Compute a block by tiles, or its first half; `finish` ends it."""

        def put(number: int, outputs: list[mx.array]) -> None:
            self._pieces[number] = outputs
            self._hidden[number] = None

        self._pieces = [[] for _ in self.spans]
        block.forward(lambda number: self._hidden[number], put)

    def keep_middle(self, index: int) -> None:
        """Put what lies between the halves of block `index` into the store."""
        with phase("spill", index):
            for number, some in enumerate(self._pieces):
                if some:
                    whole = some[0] if len(some) == 1 else mx.concatenate(some)
                    mx.eval(whole)
                    self._store.put(self._slot(index, number, middle=True), whole)

    def forward_rest(self, block: TiledBlock) -> None:
        """Compute the second half of a block."""
        block.forward_rest(self._pieces)

    def finish(self, block: TiledBlock) -> None:
        """Make the next block's input of what was computed."""
        pieces, self._pieces = flat_places(block.places, self._pieces), []
        batched = [isinstance(place, Span) for places in block.places for place in places]
        # Picked tokens are a batch of single ones.
        self._hidden = [
            piece if span else piece.swapaxes(0, 1)
            for piece, span in zip(pieces, batched, strict=True)
        ]

    def forward_whole(self, function: Callable[[mx.array], mx.array]) -> None:
        """Compute a block that cannot be computed by tiles."""
        out = function(self._joined())
        mx.eval(out)
        # The rows of a last block are no tiles.
        self._hidden = self._split(out) if out.shape == self._shape else [out]

    def result(self, rows: mx.array | None, spared: bool) -> mx.array:
        """What the last block returned, [B, T, D], or its rows [1, n, D]; the tiles are let go.

        Args:
            rows: the rows asked for.
            spared: whether the block was computed for these alone.
        """
        out = self._joined()
        self._rows = None if spared else rows
        if self._rows is not None:
            out = take_rows(out, rows)
            mx.eval(out)
        return out

    def begin_backward(self, cotangent: mx.array, block: TiledBlock | None) -> None:
        """Take the gradient with respect to `result` apart.

        Args:
            cotangent: in the shape of `result`.
            block: the last one if it was computed by tiles for some rows.
        """
        if self._rows is not None:
            cotangent = put_rows(cotangent, self._rows, self._shape)
        if block is None:
            self.set_cotangent(cotangent)
            return
        sizes = [[place.positions.size for place in places] for places in block.places]
        self._cotangents = [[None] * len(some) for some in sizes]
        start = 0
        places = [[(i, j) for j in range(len(some))] for i, some in enumerate(sizes)]
        for i, j in flat_places(block.places, places):
            stop = start + sizes[i][j]
            self._cotangents[i][j] = mx.contiguous(cotangent[0, start:stop, None])
            start = stop
        mx.eval(self._cotangents)

    def backward_rest(self, index: int, block: TiledBlock, gradients: Sums) -> None:
        """Differentiate the second half of block `index`."""

        def middle(number: int) -> list[mx.array]:
            places = block.places[number]
            if not places:
                return []
            whole = self._store.take(self._slot(index, number, middle=True))
            if isinstance(places[0], Span):
                return [whole]
            stops = np.cumsum([place.positions.size for place in places])
            return mx.split(whole, stops[:-1].tolist())

        block.backward_rest(gradients, middle, self._cotangents)

    def backward(self, index: int, block: TiledBlock, gradients: Sums, onward: bool) -> None:
        """Differentiate block `index`, or its first half."""
        block.backward(
            gradients,
            lambda number: self._store.take(self._slot(index, number), keep=True),
            self._cotangents,
            onward,
        )

    def input(self, index: int) -> mx.array:
        """The whole input of a block, [B, T, D]."""
        slots = [self._slot(index, number) for number in range(len(self.spans))]
        return mx.concatenate([self._store.take(slot) for slot in slots], axis=1)

    def set_cotangent(self, cotangent: mx.array) -> None:
        """Go on from a whole gradient, [B, T, D], or [1, n, D] of a last block's rows."""
        whole = cotangent.shape == self._shape
        self._cotangents = [[t] for t in (self._split(cotangent) if whole else [cotangent])]

    def cotangent(self) -> mx.array:
        """The whole gradient; the tiles are let go."""
        tiles, self._cotangents = [tile for (tile,) in self._cotangents], []
        whole = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)
        mx.eval(whole)
        return whole

    def _slot(self, index: int, number: int, middle: bool = False) -> int:
        block = index - self._first + (self._last + 1 - self._first if middle else 0)
        return block * len(self.spans) + number

    def _joined(self) -> mx.array:
        tiles, self._hidden = self._hidden, []
        whole = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)
        mx.eval(whole)
        return whole

    def _split(self, whole: mx.array) -> list[mx.array]:
        """Tiles of their own memory."""
        if len(self.spans) == 1:
            mx.eval(whole)
            return [whole]
        tiles = [mx.contiguous(whole[:, span.start : span.stop]) for span in self.spans]
        mx.eval(tiles)
        return tiles
