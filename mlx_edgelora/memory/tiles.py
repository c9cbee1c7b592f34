"""One block forward and backward, a tile of tokens at a time: nothing of tokens x hidden at all.

A tile is a span of tokens of every row of the batch. What the block does before and after
attention is run for one tile and evaluated; of the whole length there are only keys and
values. Forward: keys and values of all tiles, then for each tile its queries, attention over
the keys they see, and the rest of the block. Backward, from the last tile:

    q = before(x);  o = attention(q, K, V);  (dx, do) = after'(x, o; dy)
    (dq, dK[c], dV[c]) = attention'(...) for each tile c of keys;  dx += before'(x; dq)

(in one piece, or in halves: `after` ends before the MLP, and what comes there, spilled in the
forward, is differentiated first, so that only half of the weights are in memory at a time)
and when dK and dV are whole, `dx += before'(x; dK, dV)` for each tile. Hidden states, the
gradient of the output, overwritten by that of the input, and the float32 sums of dK and dV
are read from and written to streams, tile by tile. With streams on disk T (Dk + Dv) of key
heads is all that grows with the context. Each piece is one `mx.vjp` of its own, outside
of any trace.

Time beside recomputing the block whole: its first norm twice more, packed weights
dequantized for every tile, and two copies of a pair of sums for every pair of tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_edgelora.layers import attention
from mlx_edgelora.layers.order import stops
from mlx_edgelora.memory.meter import give_back
from mlx_edgelora.memory.profile import phase
from mlx_edgelora.memory.streams import KeySums, Stream, Sums, joined, split, spread
from mlx_edgelora.model.blocks import Slot, bound
from mlx_edgelora.model.masks import tiled_mask
from mlx_edgelora.model.parts import Asked, BlockParts, Place, Span, keys_seen, mask_at, tokens_at
from mlx_edgelora.model.walkable import watched

Arrays = dict[str, mx.array]
Slots = dict[str, Slot]


@dataclass
class TiledBlock:
    """One visit of a block, by tiles.

    Attributes:
        parts: the block's call; its weights are bound while methods run.
        slots: where its arrays hang.
        spans: the tiles.
        places: by tile, the tokens that it is computed for.
    """

    parts: BlockParts
    slots: Slots
    spans: list[Span]
    places: list[list[Place]]

    def forward(self, tiles: Stream, put: Callable[[int, mx.array], None]) -> None:
        """Compute the block, or its first half.

        Args:
            tiles: of the input, [B, t, D] each; read twice.
            put: is given the output of each tile that has places: [B, t, D] of a span, [m, 1, D]
                of picked tokens, place by place.
        """
        keys, values = self._keys_and_values(tiles)
        for index, places in enumerate(self.places):
            outputs = []
            for place in places:
                x = tokens_at(tiles.get(index), self.spans[index].start, place)
                out = self._place_forward(x, place, keys, values)
                del x
                mx.eval(out)
                outputs.append(out)
            if outputs:
                put(index, joined(outputs))

    def _place_forward(
        self, x: mx.array, place: Place, keys: mx.array, values: mx.array
    ) -> mx.array:
        if self.parts.through_cache:
            seen = self.parts.seen(place, keys.shape[2])
            with stops() as order:
                out = self.parts.finished(x, place, seen, _tokens(seen, keys, values))
            order.eval()
            return out
        asked = self._queries(x, place)
        attended, _ = self._attend(asked, place, keys, values)
        return self._finished(x, place, attended)

    def forward_rest(self, middle: Stream, put: Callable[[int, mx.array], None]) -> None:
        """Compute the second half from what `forward` put."""
        for index, places in enumerate(self.places):
            if not places:
                continue
            pieces = split(middle.get(index), places)
            for number, place in enumerate(places):
                with stops() as found:
                    pieces[number] = self.parts.rest(pieces[number], place)
                found.eval()
                mx.eval(pieces[number])
                give_back()
            put(index, joined(pieces))

    def backward_rest(self, gradients: Sums, middle: Stream, cotangents: Stream) -> None:
        """Differentiate the second half.

        Args:
            gradients: those of what is trained are added.
            middle: what lies between the halves, as `forward` put it.
            cotangents: of the output, in the same form; replaced by the middle's.
        """
        for index, places in enumerate(self.places):
            if not places:
                continue
            xs, pieces = (split(stream.get(index), places) for stream in (middle, cotangents))
            for number, place in enumerate(places):
                x, dy = xs[number], pieces[number]
                xs[number] = pieces[number] = None
                with phase("MLP backward"):
                    (pieces[number],) = self._vjp(
                        gradients,
                        lambda x, place=place: [self.parts.rest(x, place)],
                        [x],
                        [dy],
                        True,
                    )
                del dy, x
                give_back()
            cotangents.put(index, joined(pieces))

    def backward(
        self,
        gradients: Sums,
        tiles: Stream,
        cotangents: Stream,
        sums: KeySums,
        onward: bool,
    ) -> None:
        """Differentiate the block, or its first half.

        Args:
            gradients: those of what is trained are added.
            tiles: of the input; read three times.
            cotangents: of the output, as `forward` put it; replaced by the gradient of the
                input, [B, t, D] of every tile, if that is asked for.
            sums: holds nothing before and after.
            onward: whether it is asked for.
        """
        with phase("recompute"):
            keys, values = self._keys_and_values(tiles)
        for index in reversed(range(len(self.spans))):
            if places := self.places[index]:
                x, dys = tiles.get(index), split(cotangents.get(index), places)
                dxs = [
                    self._place_backward(gradients, x, index, p, keys, values, dys, sums, onward)
                    for p in places
                ]
                if onward:
                    cotangents.put(index, spread(dxs, places, x, self.spans[index].start))
                del dxs, dys, x
        dtypes = keys.dtype, values.dtype
        del keys, values
        for index, span in enumerate(self.spans):
            pair = sums.take(index)
            if pair is not None:
                dx = self._keys_backward(gradients, tiles.get(index), span, pair, dtypes, onward)
            elif onward:  # no query is asked for here, and no key is seen
                dx = mx.zeros_like(tiles.get(index))
            del pair
            if onward:
                dx = dx + cotangents.get(index) if self.places[index] else dx
                mx.eval(dx)
                cotangents.put(index, dx)
                del dx

    def _keys_backward(
        self,
        gradients: Sums,
        x: mx.array,
        span: Span,
        pair: list[mx.array],
        dtypes: tuple[mx.Dtype, mx.Dtype],
        onward: bool,
    ) -> mx.array | None:
        """From keys and values of a tile, whose gradients are whole, to its input."""
        with phase("attention backward"):
            (dx,) = self._vjp(
                gradients,
                lambda x: self.parts.kept(x, span),
                [x],
                [total.astype(dtype) for total, dtype in zip(pair, dtypes, strict=True)],
                onward,
            )
        return dx

    def _place_backward(
        self,
        gradients: Sums,
        tile: mx.array,
        index: int,
        place: Place,
        keys: mx.array,
        values: mx.array,
        cotangents: list[mx.array],
        sums: KeySums,
        onward: bool,
    ) -> mx.array | None:
        """From what the block returns at a place to its input there; adds to `sums`.

        The first of `cotangents` is the place's, and is taken out.
        """
        x = tokens_at(tile, self.spans[index].start, place)
        if self.parts.through_cache:
            return self._cached_backward(gradients, x, place, keys, values, cotangents, sums)
        with phase("recompute"):
            asked = self._queries(x, place)
            attended, statistics = self._attend(asked, place, keys, values)
        # In one piece most of what comes after attention is the MLP.
        with phase("attention backward" if self.parts.branches else "MLP backward"):
            dx, dattended = self._vjp(
                gradients,
                lambda x, attended: [self._finished(x, place, attended)],
                [x, attended],
                [cotangents.pop(0)],
                True,
            )
        with phase("attention backward"):
            dq = self._attend_backward(
                asked, place, keys, values, attended, statistics, dattended, sums
            )
            del asked, attended, statistics, dattended
            (more,) = self._vjp(
                gradients, lambda x: [self.parts.before(x, place).q], [x], [dq], onward
            )
        if not onward:
            return None
        dx = dx + more
        mx.eval(dx)
        return dx

    def _cached_backward(
        self,
        gradients: Sums,
        x: mx.array,
        span: Span,
        keys: mx.array,
        values: mx.array,
        cotangents: list[mx.array],
        sums: KeySums,
    ) -> mx.array:
        """As `_place_backward`, of a block that is cut at its cache: in one piece."""
        seen = self.parts.seen(span, keys.shape[2])
        with phase("attention backward"):
            dx, *pair = self._vjp(
                gradients,
                lambda x, *cached: [self.parts.finished(x, span, seen, list(cached))],
                [x, *_tokens(seen, keys, values)],
                [cotangents.pop(0)],
                True,
            )
        self._add(sums, seen, slice(None), pair, keys.shape[0])
        return dx

    def _add(self, sums: KeySums, seen: Span, row: slice, pair: list[mx.array], batch: int) -> None:
        """Add the gradients of the keys and values that were seen, tile by tile."""
        for index, span in enumerate(self.spans):
            if span.start < seen.stop and span.stop > seen.start:
                sums.add(index, row, [_within(d, seen, span) for d in pair], batch)

    def _finished(self, x: mx.array, place: Place, attended: mx.array) -> mx.array:
        """The block after attention, up to its end or to the middle."""
        after = self.parts.after if self.parts.branches is None else self.parts.middle
        return after(x, place, attended)

    def _keys_and_values(self, tiles: Stream) -> tuple[mx.array, mx.array]:
        """Of all tokens: [B, Hkv, T, D] and [B, Hkv, T, Dv]."""
        whole: list[mx.array] = []
        for index, span in enumerate(self.spans):
            pieces = self.parts.kept(tiles.get(index), span)
            if len(self.spans) == 1:
                mx.eval(pieces)
                return tuple(pieces)
            if not whole:
                tokens = self.spans[-1].stop
                whole = [mx.zeros((*p.shape[:2], tokens, p.shape[3]), p.dtype) for p in pieces]
            for number, piece in enumerate(pieces):  # written in place, not concatenated
                whole[number][:, :, span.start : span.stop] = piece
            del pieces, piece
            mx.eval(whole)
        return tuple(whole)

    def _queries(self, x: mx.array, place: Place) -> Asked:
        asked = self.parts.before(x, place)
        mx.eval(asked.q)
        # Keys and values, never computed here, would keep what they are made of.
        return asked._replace(k=None, v=None)

    def _attend(
        self, asked: Asked, place: Place, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """Attention of the queries over all keys they see; statistics if it is in tiles."""
        _, keys, values, mask = self._seen(asked, place, keys, values)
        queries, keys, values = attention.promoted(asked.q, keys, values)
        options = {"scale": asked.scale, "mask": mask, "sinks": asked.sinks}
        if attention.use_fused(queries, keys, values, mask=mask, sinks=asked.sinks)[0]:
            result = mx.fast.scaled_dot_product_attention(queries, keys, values, **options), None
        else:
            with stops() as order:
                result = attention.attention_forward(queries, keys, values, **options)
            order.eval()
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
        sums: KeySums,
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
            self._add(sums, seen, row, pair, keys.shape[0])
            return dq
        dq = mx.zeros(asked.q.shape)
        for index, span in enumerate(self.spans):
            sees, mask = mask_at(asked.mask, place, span)
            if not sees:
                continue
            part = [x[row, :, span.start : span.stop] for x in (keys, values)]
            with stops() as order:
                dq, *pair = attention.attention_backward(
                    *attention.promoted(asked.q, *part),
                    (attended, statistics),
                    cotangent,
                    scale=asked.scale,
                    mask=tiled_mask(mask, asked.q.shape[2], span.stop - span.start),
                    dq=dq,
                )
            order.eval()
            mx.eval(dq, pair)
            sums.add(index, row, pair, keys.shape[0])
        return dq.astype(asked.q.dtype)

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
        gradients: Sums,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        cotangents: list[mx.array],
        onward: bool,
    ) -> list[mx.array]:
        """Differentiate a part of the block; gradients of its inputs are evaluated if asked for."""
        trained, reached = gradients.values, set()
        names, count = list(trained), len(trained)

        def bound_function(*primals: mx.array) -> list[mx.array]:
            seen = {
                name: watched(lambda name=name: reached.add(name))(value)
                for name, value in zip(names, primals[:count], strict=True)
            }
            with bound(self.slots, seen):
                results = function(*primals[count:])
            order.clear()  # a gradient needs little of the forward
            return results

        with stops() as order:
            _, found = mx.vjp(bound_function, [*trained.values(), *inputs], cotangents)
        del inputs, cotangents
        if onward:
            order.eval()
        # Of what a part does not reach the gradients are zeros: not evaluated, not added. Which
        # arrays these are may be decided by the values of a tile: experts, for one.
        own = {name: value for name, value in zip(names, found, strict=False) if name in reached}
        results = found[count:]
        del found
        mx.eval(own, results if onward else [])
        gradients.add(list(own), list(own.values()))
        return results if onward else [None] * len(results)


def _tokens(span: Span, *arrays: mx.array) -> list[mx.array]:
    """The tokens of a span, of arrays [B, heads, T, n]."""
    return [array[:, :, span.start : span.stop] for array in arrays]


def _within(gradient: mx.array, seen: Span, span: Span) -> mx.array:
    """Of a gradient of the keys seen the part in a tile, with zeros for its other keys."""
    start, stop = max(seen.start, span.start), min(seen.stop, span.stop)
    part = gradient[:, :, start - seen.start : stop - seen.start]
    edges = (start - span.start, span.stop - stop)
    return mx.pad(part, [(0, 0), (0, 0), edges, (0, 0)]) if any(edges) else part
