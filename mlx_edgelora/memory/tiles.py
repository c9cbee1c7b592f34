"""One block forward and backward, a tile of tokens at a time: nothing of tokens x hidden but once.

A tile is a span of tokens of every row of the batch. What the block does before and after
attention is run for one tile and evaluated; of the whole length there are only keys, values
and their gradients. Forward: keys and values of all tiles, then for each tile its queries,
attention over the keys they see, and the rest of the block. Backward, from the last tile:

    q = before(x);  o = attention(q, K, V);  (dx, do) = after'(x, o; dy)
    (dq, dK[c], dV[c]) = attention'(...) for each tile c of keys;  dx += before'(x; dq)

(in one piece, or in halves: `after` ends before the MLP, and what comes there, spilled in the
forward, is differentiated first, so that only half of the weights are in memory at a time)
and when dK and dV are whole, `dx += before'(x; dK, dV)` for each tile. The input of a block
stays in the activation store, tile by tile, and the gradient of its output is overwritten by
that of its input; so of the arrays of T x hidden one is in memory, beside 2 T (Dk + Dv) of
key heads. Each piece is one `mx.vjp` of its own, outside of any trace.

Time beside recomputing the block whole: its first norm twice more, and packed weights
dequantized for every tile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edgelora.layers import attention
from mlx_edgelora.memory.profile import phase
from mlx_edgelora.model.blocks import Slot, bound
from mlx_edgelora.model.masks import tiled_mask
from mlx_edgelora.model.parts import (
    Asked,
    BlockParts,
    Picked,
    Place,
    Span,
    keys_seen,
    mask_at,
    tokens_at,
)
from mlx_edgelora.model.walkable import watched

Arrays = dict[str, mx.array]
Slots = dict[str, Slot]
# By part of a block: the trained arrays its gradient reaches.
Used = dict[str, list[str]]
# Gives a tile of a block's input, [B, t, D], evaluated.
Tile = Callable[[int], mx.array]


def spans_of(tokens: int, size: int) -> list[Span]:
    """Cut the tokens of a row into tiles of nearly one length, `size` at most."""
    count = -(-tokens // size)
    step = -(-tokens // count)
    return [Span(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def places_of(spans: Sequence[Span], rows: np.ndarray | None, tokens: int) -> list[list[Place]]:
    """Which tokens of each tile a block is computed for: all, or those of some rows.

    Args:
        spans: the tiles.
        rows: int [n], ascending, of the batch * tokens rows; None for all.
        tokens: of a row of the batch.
    """
    if rows is None:
        return [[span] for span in spans]
    batch, positions = np.divmod(rows.astype(np.int32), tokens)
    result: list[list[Place]] = []
    for span in spans:
        inside = (positions >= span.start) & (positions < span.stop)
        found = [(row, positions[inside & (batch == row)]) for row in np.unique(batch[inside])]
        result.append([Picked(int(row), where) for row, where in found])
    return result


@dataclass
class TiledBlock:
    """One visit of a block, by tiles.

    Attributes:
        parts: the block's call; its weights are bound while methods run.
        slots: where its arrays hang.
        spans: the tiles.
        places: by tile, the tokens that it is computed for.
        used: which trained arrays each part's gradient reaches, found on the first visit;
            the same dict for every visit of the block.
    """

    parts: BlockParts
    slots: Slots
    spans: list[Span]
    places: list[list[Place]]
    used: Used = field(default_factory=dict)

    def forward(self, tile: Tile, put: Callable[[int, list[mx.array]], None]) -> None:
        """Compute the block.

        Args:
            tile: gives a tile of the input; asked for twice.
            put: is given each tile's outputs, one for each of its places: [B, t, D] of a
                span, [m, 1, D] of picked tokens. In halves it is what lies between them.
        """
        keys, values = self._keys_and_values(tile)
        for index, places in enumerate(self.places):
            outputs = []
            for place in places:
                x = tokens_at(tile(index), self.spans[index].start, place)
                asked = self._queries(x, place)
                attended, _ = self._attend(asked, place, keys, values)
                out = self._finished(x, place, attended)
                del asked, attended, x
                mx.eval(out)
                outputs.append(out)
            put(index, outputs)

    def forward_rest(self, pieces: list[list[mx.array]]) -> None:
        """Compute the second half in place of what lies between the halves, by tile and place."""
        for places, some in zip(self.places, pieces, strict=True):
            for number, place in enumerate(places):
                some[number] = self.parts.rest(some[number], place)
                mx.eval(some[number])

    def backward_rest(
        self,
        gradients: "Sums",
        middle: Callable[[int], list[mx.array]],
        cotangents: list[list[mx.array]],
    ) -> None:
        """Differentiate the second half.

        Args:
            gradients: those of what is trained are added.
            middle: gives what lies between the halves in a tile, at each of its places.
            cotangents: of the output, by tile and place; replaced by the middle's.
        """
        for index, places in enumerate(self.places):
            for number, (place, x) in enumerate(zip(places, middle(index), strict=True)):
                dy, cotangents[index][number] = cotangents[index][number], None
                with phase("MLP backward"):
                    (cotangents[index][number],) = self._vjp(
                        gradients,
                        "rest",
                        lambda x, place=place: [self.parts.rest(x, place)],
                        [x],
                        [dy],
                        True,
                    )
                del dy, x

    def backward(
        self, gradients: "Sums", tile: Tile, cotangents: list[list[mx.array]], onward: bool
    ) -> None:
        """Differentiate the block, or its first half.

        Args:
            gradients: those of what is trained are added.
            tile: gives a tile of the input; asked for three times.
            cotangents: by tile, of the output at each of its places; replaced by
                the gradient of the input, one array [B, t, D] a tile, if that is asked for.
            onward: whether it is.
        """
        with phase("recompute"):
            keys, values = self._keys_and_values(tile)
        sums: list[list[mx.array] | None] = [None] * len(self.spans)
        for index in reversed(range(len(self.spans))):
            x = tile(index)
            dxs = [
                self._place_backward(
                    gradients, x, index, place, keys, values, cotangents, sums, onward
                )
                for place in self.places[index]
            ]
            cotangents[index] = _joined(dxs, self.places[index], x, self.spans[index].start)
            mx.eval(cotangents[index])
            del dxs, x
        dtype = keys.dtype
        del keys, values
        for index, span in enumerate(self.spans):
            pair, sums[index] = sums[index], None
            if pair is None:  # no query is asked for here, and no key is seen
                if onward:
                    cotangents[index] = [mx.zeros_like(tile(index))]
                    mx.eval(cotangents[index])
                continue
            x = tile(index)
            cotangent = [total.astype(dtype) for total in pair]
            del pair
            with phase("attention backward"):
                (dx,) = self._vjp(
                    gradients,
                    "keys",
                    lambda x, span=span: self._keys(x, span),
                    [x],
                    cotangent,
                    onward,
                )
            if onward:
                cotangents[index] = [dx + c for c in cotangents[index]] or [dx]
                mx.eval(cotangents[index])

    def _place_backward(
        self,
        gradients: "Sums",
        tile: mx.array,
        index: int,
        place: Place,
        keys: mx.array,
        values: mx.array,
        cotangents: list[list[mx.array]],
        sums: list[list[mx.array] | None],
        onward: bool,
    ) -> mx.array | None:
        """From what the block returns at a place to its input there; adds to `sums`."""
        x = tokens_at(tile, self.spans[index].start, place)
        with phase("recompute"):
            asked = self._queries(x, place)
            attended, statistics = self._attend(asked, place, keys, values)
        # In one piece most of what comes after attention is the MLP.
        with phase("attention backward" if self.parts.branches else "MLP backward"):
            dx, dattended = self._vjp(
                gradients,
                "after",
                lambda x, attended: [self._finished(x, place, attended)],
                [x, attended],
                [cotangents[index].pop(0)],
                True,
            )
        with phase("attention backward"):
            dq = self._attend_backward(
                asked, place, keys, values, attended, statistics, dattended, sums
            )
            del asked, attended, statistics, dattended
            (more,) = self._vjp(
                gradients, "queries", lambda x: [self.parts.before(x, place).q], [x], [dq], onward
            )
        if not onward:
            return None
        dx = dx + more
        mx.eval(dx)
        return dx

    def _finished(self, x: mx.array, place: Place, attended: mx.array) -> mx.array:
        """The block after attention, up to its end or to the middle."""
        after = self.parts.after if self.parts.branches is None else self.parts.middle
        return after(x, place, attended)

    def _keys_and_values(self, tile: Tile) -> tuple[mx.array, mx.array]:
        """Of all tokens: [B, Hkv, T, D] and [B, Hkv, T, Dv]."""
        pieces = []
        for index, span in enumerate(self.spans):
            pieces.append(self._keys(tile(index), span))
            mx.eval(pieces[-1])
        if len(pieces) == 1:
            return tuple(pieces[0])
        joined = [mx.concatenate(parts, axis=2) for parts in zip(*pieces, strict=True)]
        mx.eval(joined)
        return tuple(joined)

    def _keys(self, x: mx.array, span: Span) -> list[mx.array]:
        asked = self.parts.before(x, span)
        return [asked.k, asked.v]

    def _queries(self, x: mx.array, place: Place) -> Asked:
        asked = self.parts.before(x, place)
        mx.eval(asked.q)
        return asked

    def _attend(
        self, asked: Asked, place: Place, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """Attention of the queries over all keys they see; statistics if it is in tiles."""
        _, keys, values, mask = self._seen(asked, place, keys, values)
        options = {"scale": asked.scale, "mask": mask, "sinks": asked.sinks}
        if attention.use_fused(asked.q, keys, values, mask=mask, sinks=asked.sinks)[0]:
            result = mx.fast.scaled_dot_product_attention(asked.q, keys, values, **options), None
        else:
            result = attention.attention_forward(asked.q, keys, values, **options)
        mx.eval(result)
        return result

    def _attend_backward(
        self,
        asked: Asked,
        place: Place,
        keys: mx.array,
        values: mx.array,
        attended: mx.array,
        statistics: mx.array | None,
        cotangent: mx.array,
        sums: list[list[mx.array] | None],
    ) -> mx.array:
        """The gradient of the queries; those of keys and values are added to `sums`."""
        row = slice(None) if isinstance(place, Span) else slice(place.row, place.row + 1)
        if statistics is None:
            seen, *pair, mask = self._seen(asked, place, keys, values)
            options = {"scale": asked.scale, "mask": mask, "sinks": asked.sinks}
            _, (dq, *pair) = mx.vjp(
                lambda *qkv: mx.fast.scaled_dot_product_attention(*qkv, **options),
                [asked.q, *pair],
                [cotangent],
            )
            mx.eval(dq, pair)
            for index, span in enumerate(self.spans):
                if span.start < seen.stop and span.stop > seen.start:
                    part = [_within(d, seen, span) for d in pair]
                    self._add_to(sums, index, row, part, keys, values)
            return dq
        dq = None
        for index, span in enumerate(self.spans):
            sees, mask = mask_at(asked.mask, place, span)
            if not sees:
                continue
            part = [x[row, :, span.start : span.stop] for x in (keys, values)]
            more, *pair = attention.attention_backward(
                asked.q,
                *part,
                attended,
                statistics,
                cotangent,
                scale=asked.scale,
                mask=tiled_mask(mask, asked.q.shape[2], span.stop - span.start),
            )
            more = more.astype(mx.float32)
            dq = more if dq is None else dq + more
            del more
            mx.eval(dq, pair)
            self._add_to(sums, index, row, pair, keys, values)
        return dq.astype(asked.q.dtype)

    def _add_to(
        self,
        sums: list[list[mx.array] | None],
        index: int,
        row: slice,
        pair: list[mx.array],
        keys: mx.array,
        values: mx.array,
    ) -> None:
        """Add gradients of the keys and values of one tile, in float32."""
        pair = [d.astype(mx.float32) for d in pair]
        if sums[index] is None and pair[0].shape[0] < keys.shape[0]:
            span = self.spans[index]
            shapes = [(*x.shape[:2], span.stop - span.start, x.shape[3]) for x in (keys, values)]
            sums[index] = [mx.zeros(shape) for shape in shapes]
        if sums[index] is None:
            sums[index] = pair
        else:
            for place, more in enumerate(pair):
                if more.shape[0] == keys.shape[0]:
                    sums[index][place] = sums[index][place] + more
                else:
                    sums[index][place][row] = sums[index][place][row] + more
        mx.eval(sums[index])

    def _seen(
        self, asked: Asked, place: Place, keys: mx.array, values: mx.array
    ) -> tuple[Span, mx.array, mx.array, attention.Mask]:
        """The keys and values that tokens at a place may see: where, and the mask between."""
        span = keys_seen(asked.mask, place, keys.shape[2])
        row = slice(None) if isinstance(place, Span) else slice(place.row, place.row + 1)
        mask = tiled_mask(
            mask_at(asked.mask, place, span)[1], asked.q.shape[2], span.stop - span.start
        )
        return span, *(x[row, :, span.start : span.stop] for x in (keys, values)), mask

    def _vjp(
        self,
        gradients: "Sums",
        part: str,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        cotangents: list[mx.array],
        onward: bool,
    ) -> list[mx.array]:
        """Differentiate a part of the block; gradients of its inputs are evaluated if asked for."""
        names = self._reached(part, function, inputs, cotangents, gradients.values)
        primals = [gradients.values[name] for name in names] + inputs

        def bound_function(*primals: mx.array) -> list[mx.array]:
            with bound(self.slots, dict(zip(names, primals[: len(names)], strict=True))):
                return function(*primals[len(names) :])

        _, found = mx.vjp(bound_function, primals, cotangents)
        del primals, cotangents
        results = found[len(names) :]
        mx.eval(found[: len(names)], results if onward else [])
        gradients.add(names, found[: len(names)])
        return results if onward else [None] * len(results)

    def _reached(
        self,
        part: str,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        cotangents: list[mx.array],
        trained: Arrays,
    ) -> list[str]:
        """The trained arrays that have a gradient through a part: the others' would be zeros."""
        if part not in self.used:
            reached: set[str] = set()

            def with_watchers(*values: mx.array) -> list[mx.array]:
                seen = {
                    name: watched(lambda name=name: reached.add(name))(value)
                    for name, value in zip(trained, values, strict=True)
                }
                with bound(self.slots, seen):
                    return function(*inputs)

            if trained:
                mx.vjp(with_watchers, list(trained.values()), cotangents)
            self.used[part] = [name for name in trained if name in reached]
        return self.used[part]


class Sums:
    """Sums of gradients of a block's trained arrays over its tiles.

    Attributes:
        values: the trained arrays of this visit.
    """

    def __init__(self) -> None:
        self.values: Arrays = {}
        self._totals: Arrays = {}

    def of(self, values: Arrays) -> "Sums":
        """The same sums, for another visit."""
        self.values = values
        return self

    def add(self, names: list[str], gradients: list[mx.array]) -> None:
        """Add evaluated gradients."""
        for name, value in zip(names, gradients, strict=True):
            self._totals[name] = self._totals[name] + value if name in self._totals else value
        mx.eval([self._totals[name] for name in names])

    def totals(self) -> Arrays:
        """All sums; zeros where nothing was added."""
        zeros = {n: mx.zeros_like(v) for n, v in self.values.items() if n not in self._totals}
        mx.eval(zeros)
        return {name: self._totals.get(name, zeros.get(name)) for name in self.values}


def _within(gradient: mx.array, seen: Span, span: Span) -> mx.array:
    """Of a gradient of the keys seen the part in a tile, with zeros for its other keys."""
    start, stop = max(seen.start, span.start), min(seen.stop, span.stop)
    part = gradient[:, :, start - seen.start : stop - seen.start]
    edges = (start - span.start, span.stop - stop)
    return mx.pad(part, [(0, 0), (0, 0), edges, (0, 0)]) if any(edges) else part


def _joined(
    pieces: list[mx.array | None], places: list[Place], tile: mx.array, start: int
) -> list[mx.array]:
    """The gradients at a tile's places as one array of the tile; none if there are none."""
    if not pieces or pieces[0] is None:
        return []
    if isinstance(places[0], Span):
        return pieces
    whole = mx.zeros(tile.shape, pieces[0].dtype)
    for piece, place in zip(pieces, places, strict=True):
        whole[place.row, mx.array(place.positions - start)] = piece[:, 0]
    return [whole]


def flat_places(places: list[list[Place]], pieces: list[list[Any]]) -> list[Any]:
    """Pieces by tile and place in the order of the batch's rows: row by row, tile by tile."""
    keyed = [
        (place.row if isinstance(place, Picked) else 0, index, piece)
        for index, (some, found) in enumerate(zip(places, pieces, strict=True))
        for place, piece in zip(some, found, strict=True)
    ]
    return [piece for _, _, piece in sorted(keyed, key=lambda item: item[:2])]
