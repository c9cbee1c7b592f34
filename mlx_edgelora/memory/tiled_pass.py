"""One forward pass by tiles of tokens, and its backward: hidden states as streams of tiles.

What the model's own loop hands from block to block is then a placeholder that is never
computed: it only tells what each block is called with. Every tile of every block's input has
a slot of its own in the activation store, and so have those of the gradient on its way down
and of the sums of dK and dV. With a store on disk, of tokens x hidden there is nothing in
memory but the embedding's output, once, while it is cut, and what the loss asks for.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_edgelora.memory.profile import phase
from mlx_edgelora.memory.stores import ActivationStore
from mlx_edgelora.memory.streams import (
    KeySums,
    Sums,
    flat_places,
    joined,
    places_of,
    spans_of,
    split,
    spread,
)
from mlx_edgelora.memory.tiles import Slots, TiledBlock
from mlx_edgelora.model.labelled import checked_rows
from mlx_edgelora.model.parts import BlockParts, Place, Span, tokens_at


class _Slots:
    """A stream in consecutive slots of a store."""

    def __init__(self, store: ActivationStore, first: int) -> None:
        self._store, self._first = store, first

    def put(self, number: int, array: mx.array) -> None:
        """Keep an array in place of the one that was there."""
        with phase("spill"):
            self._store.put(self._first + number, array)

    def get(self, number: int) -> mx.array:
        """Give it; it stays."""
        return self._store.take(self._first + number, keep=True)

    def forget(self, number: int) -> None:
        """Let go of it, if it is there."""
        self._store.forget(self._first + number)


class TiledPass:
    """The tiles of one pass, on their way through the blocks and back.

    Args:
        tile_tokens: tokens of a tile, over all rows of the batch.
        x: the first block's input, [B, T, D].
        store: where the tiles wait.
        first: the lowest block that is differentiated: the inputs from there on are kept.
        blocks: number of blocks.
        halves: whether blocks are computed in halves, and what lies between is kept too.
        keys: numbers that keys, or values, of a token are made of, the larger of the two.
    """

    def __init__(
        self,
        tile_tokens: int,
        x: mx.array,
        store: ActivationStore,
        first: int,
        blocks: int,
        halves: bool,
        keys: int,
    ) -> None:
        self._shape, self._store = x.shape, store
        self._first, self._kept, self._halves = first, blocks - first, halves
        batch, tokens, width = x.shape
        self.spans = spans_of(tokens, max(1, tile_tokens // batch))
        most = max(span.stop - span.start for span in self.spans)
        # Hidden states of the blocks below, and in the backward the cotangents.
        own, scratch, sums = (2 if halves else 1) * self._kept, 1, 2 * (self._kept > 0)
        store.reserve(
            (own + scratch + sums) * len(self.spans),
            batch * most * max(width * x.dtype.size, 4 * keys * (self._kept > 0)),
        )
        self._scratch = self._stream(own)
        self._sums = KeySums(self._stream(own + scratch))
        # Which rows of the last block's output are asked for, by tile; and they themselves.
        self._wanted: list[list[Place]] = []
        self._pieces: list[list[mx.array]] = []
        self._spared = False
        self._cut(x, self._input(0))

    def want(self, rows: mx.array | None, spared: bool) -> None:
        """Say before the last block which rows of its output `result` is to give.

        Args:
            rows: int [n], of the batch * tokens rows; None for all.
            spared: whether a tiled last block is computed for these alone.
        """
        batch, tokens, _ = self._shape
        indices = None if rows is None else checked_rows(rows, batch * tokens)
        self._wanted, self._spared = places_of(self.spans, indices, tokens), spared
        self._pieces = [[] for _ in self.spans]

    def block(self, index: int, parts: BlockParts, slots: Slots) -> TiledBlock:
        """A visit of a block by tiles.

        Args:
            index: of the block; what is wanted of the last one has been said.
            parts: the block's call.
            slots: where the block's arrays hang.
        """
        spared = self._spared and self._is_last(index)
        places = self._wanted if spared else [[span] for span in self.spans]
        return TiledBlock(parts, slots, self.spans, places)

    def forward(self, index: int, block: TiledBlock) -> None:
        """Compute block `index` by tiles, or its first half."""
        halves = block.parts.branches is not None
        put = self._middle(index).put if halves else self._output(index)
        block.forward(self._input(index), put)

    def forward_rest(self, index: int, block: TiledBlock) -> None:
        """Compute the second half of block `index`."""
        block.forward_rest(self._middle(index), self._output(index))

    def put_output(self, index: int, out: mx.array) -> None:
        """Go on from the output of a block that was not computed by tiles, [B, T, D]."""
        put = self._output(index)
        for number, span in enumerate(self.spans):
            put(number, _tile(out, span))

    def result(self) -> mx.array:
        """What is wanted of the last block's output: [B, T, D], or [1, n, D] of rows."""
        pieces = [
            piece if isinstance(place, Span) else piece.swapaxes(0, 1)  # a batch of single tokens
            for place, piece in zip(
                flat_places(self._wanted, self._wanted),
                flat_places(self._wanted, self._pieces),
                strict=True,
            )
        ]
        self._pieces = []
        self._forget(self._scratch)
        whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
        mx.eval(whole)
        return whole

    def begin_backward(self, cotangent: mx.array) -> None:
        """Take the gradient with respect to `result`, in its shape, apart."""
        if cotangent.shape == self._shape and isinstance(self._wanted[0][0], Span):
            self.set_cotangent(cotangent)
            return
        bounds, start = [[0] * len(places) for places in self._wanted], 0
        order = [[(i, j) for j in range(len(some))] for i, some in enumerate(self._wanted)]
        for i, j in flat_places(self._wanted, order):
            bounds[i][j] = start
            start += self._wanted[i][j].positions.size
        for number, (places, span) in enumerate(zip(self._wanted, self.spans, strict=True)):
            pieces = [
                mx.contiguous(cotangent[0, first : first + place.positions.size, None])
                for first, place in zip(bounds[number], places, strict=True)
            ]
            mx.eval(pieces)
            if self._spared and pieces:
                self._scratch.put(number, joined(pieces))
            elif not self._spared:
                tile = (self._shape[0], span.stop - span.start, self._shape[2])
                whole = mx.zeros(tile, cotangent.dtype)
                self._scratch.put(number, spread(pieces, places, whole, span.start))

    def backward_rest(self, index: int, block: TiledBlock, gradients: Sums) -> None:
        """Differentiate the second half of block `index`."""
        block.backward_rest(gradients, self._middle(index), self._scratch)

    def backward(self, index: int, block: TiledBlock, gradients: Sums, onward: bool) -> None:
        """Differentiate block `index`, or its first half."""
        block.backward(gradients, self._input(index), self._scratch, self._sums, onward)

    def input(self, index: int) -> mx.array:
        """The whole input of a block, [B, T, D]."""
        return self._joined(self._input(index))

    def set_cotangent(self, cotangent: mx.array) -> None:
        """Go on from a whole gradient, [B, T, D]."""
        self._cut(cotangent, self._scratch)

    def cotangent(self) -> mx.array:
        """The whole gradient."""
        return self._joined(self._scratch)

    def forget(self, index: int) -> None:
        """Let go of what block `index` needed for its backward."""
        self._forget(self._input(index))
        if self._halves:
            self._forget(self._middle(index))
        if index == self._first:  # the gradient goes no further
            self._forget(self._scratch)

    def _forget(self, stream: _Slots) -> None:
        for number in range(len(self.spans)):
            stream.forget(number)

    def _is_last(self, index: int) -> bool:
        return index + 1 == self._first + self._kept

    def _stream(self, number: int) -> _Slots:
        return _Slots(self._store, number * len(self.spans))

    def _input(self, index: int) -> _Slots:
        return self._scratch if index < self._first else self._stream(index - self._first)

    def _middle(self, index: int) -> _Slots:
        if index < self._first:
            return self._scratch
        return self._stream(self._kept + index - self._first)

    def _output(self, index: int) -> Callable[[int, mx.array], None]:
        """What is done with a block's output: the next one's input, or what is wanted of it."""
        if not self._is_last(index):
            return self._input(index + 1).put

        def put(number: int, tile: mx.array) -> None:
            places = self._wanted[number]
            if self._spared and places:
                pieces = split(tile, places)
            else:
                pieces = [tokens_at(tile, self.spans[number].start, place) for place in places]
            mx.eval(pieces)
            self._pieces[number] = pieces

        return put

    def _cut(self, whole: mx.array, stream: _Slots) -> None:
        mx.eval(whole)
        for number, span in enumerate(self.spans):
            stream.put(number, _tile(whole, span))

    def _joined(self, stream: _Slots) -> mx.array:
        tiles = [stream.get(number) for number in range(len(self.spans))]
        whole = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)
        mx.eval(whole)
        return whole


def _tile(whole: mx.array, span: Span) -> mx.array:
    """A tile of memory of its own."""
    if span.stop - span.start == whole.shape[1]:
        return whole
    tile = mx.contiguous(whole[:, span.start : span.stop])
    mx.eval(tile)
    return tile
