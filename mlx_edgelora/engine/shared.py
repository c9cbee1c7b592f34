"""What blocks return for later blocks, and the sums of its gradients, in the pass's store.

    forward:   the source puts its arrays (K and V, say); each reader takes them
    backward:  each reader takes them again and adds its gradients to a sum, which the source's
               backward takes as the gradient of its outputs; then both are discarded

They are cut into the tiles of the pass, as hidden states are. Memory: that of the store; a sum is
float32, and one tile of it is in memory while a reader adds to it.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_edgelora.blocks.outputs import Extra, Link, OutputForm
from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.engine.hidden import Hidden, Slots, tokens_of

Arrays = list[mx.array]


class SharedOutputs:
    """The arrays that blocks of one pass read of each other.

    Args:
        forms: what each block returns.
        slots: slots of the store.
        spans: tiles of tokens.
        batch: rows of the batch.
        first: index of the lowest block that is differentiated.
    """

    def __init__(
        self,
        forms: Sequence[OutputForm | None],
        slots: Slots,
        spans: Sequence[TokenSpan],
        batch: int,
        first: int,
    ) -> None:
        self._forms, self._slots, self._spans = forms, slots, spans
        self._batch, self._first = batch, first
        self._values: dict[Link, Hidden] = {}
        self._sums: dict[Link, Hidden] = {}
        self._dtypes: dict[Link, mx.Dtype] = {}

    def links(self, source: int) -> list[Link]:
        """What later blocks read of a block, in the order of its outputs."""
        form = self._forms[source]
        return [] if form is None else [Link(source, leaf) for leaf in form.read]

    def shapes(self, source: int) -> list[tuple[int, ...]]:
        """The shapes of these arrays."""
        tokens = self._spans[-1].stop
        return [self._extra(link).shape(self._batch, tokens) for link in self.links(source)]

    def put(self, source: int, arrays: Sequence[mx.array]) -> None:
        """Store what a block returned, evaluated."""
        for number, span in enumerate(self._spans):
            self.put_tile(source, number, self._cut(self.links(source), arrays, span))

    def put_tile(self, source: int, number: int, arrays: Sequence[mx.array]) -> None:
        """Store one tile of what a block returned, evaluated."""
        for link, array in zip(self.links(source), arrays, strict=True):
            self._dtypes[link] = array.dtype
            self._kept(self._values, link).put(number, array)

    def take(self, links: Sequence[Link]) -> Arrays:
        """The arrays of earlier blocks; zeros of blocks that were not computed."""
        return self._joined([self.tile(links, number) for number in range(len(self._spans))], links)

    def tile(self, links: Sequence[Link], number: int) -> Arrays:
        """One tile of the arrays of earlier blocks."""
        return [self._tile(self._values, link, number) for link in links]

    def add(self, links: Sequence[Link], gradients: Sequence[mx.array]) -> None:
        """Add the gradients of a reader, evaluated."""
        for number, span in enumerate(self._spans):
            self.add_tile(links, number, self._cut(links, gradients, span))

    def add_tile(self, links: Sequence[Link], number: int, gradients: Sequence[mx.array]) -> None:
        """Add the gradients of one tile of a reader, evaluated."""
        for link, gradient in zip(links, gradients, strict=True):
            if link.source < self._first:  # nothing below is trained
                continue
            total = self._tile(self._sums, link, number) + gradient
            mx.eval(total)
            self._kept(self._sums, link).put(number, total)

    def cotangents(self, source: int) -> Arrays:
        """The sums of the gradients of what a block returned."""
        tiles = [self.cotangent_tile(source, number) for number in range(len(self._spans))]
        return self._joined(tiles, self.links(source))

    def cotangent_tile(self, source: int, number: int) -> Arrays:
        """One tile of the sums of gradients, in the dtype of what the block returned."""
        links = self.links(source)
        return [self._tile(self._sums, link, number).astype(self._dtypes[link]) for link in links]

    def forget(self, source: int) -> None:
        """Discard what a block returned, and the sums."""
        for link in self.links(source):
            for kept in (self._values, self._sums):
                if link in kept:
                    kept.pop(link).forget()

    def _extra(self, link: Link) -> Extra:
        return self._forms[link.source].leaves[link.leaf]

    def _kept(self, where: dict[Link, Hidden], link: Link) -> Hidden:
        if link not in where:
            where[link] = Hidden.tiles(self._spans, self._slots, self._extra(link).token_axis)
        return where[link]

    def _tile(self, where: dict[Link, Hidden], link: Link, number: int) -> mx.array:
        if link in where and where[link].has(number):
            return where[link].tile(number)
        extra, span = self._extra(link), self._spans[number]
        dtype = mx.float32 if where is self._sums else self._dtypes.get(link, extra.dtype)
        return mx.zeros(extra.shape(self._batch, span.stop - span.start), dtype)

    def _cut(self, links: Sequence[Link], arrays: Sequence[mx.array], span: TokenSpan) -> Arrays:
        pairs = zip(links, arrays, strict=True)
        found = [
            mx.contiguous(tokens_of(array, span, self._extra(link).token_axis))
            for link, array in pairs
        ]
        mx.eval(found)
        return found

    def _joined(self, tiles: Sequence[Arrays], links: Sequence[Link]) -> Arrays:
        if len(tiles) == 1:
            return tiles[0]
        found = [
            mx.concatenate(parts, axis=self._extra(link).token_axis)
            for link, *parts in zip(links, *tiles, strict=True)
        ]
        mx.eval(found)
        return found
