"""The tiles of `layers/attention.py`: their order, and their arithmetic in both directions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import e, isqrt, log2
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.layers.grid_outputs import HeadBuffer, MaskGradient, UnitSums
from mlx_edgelora.layers.key_sums import PIECE, KeyCall, KeySums
from mlx_edgelora.layers.tile_order import Span, depend_on

# With this many tiles, a head has more operations than MLX allocates ahead (1 is too few).
IN_PLACE_TILES = 3
LOG2E = log2(e)
MASKED = mx.finfo(mx.float32).min

Unit = tuple[int, int, int]  # batch entry, first key head, last key head + 1
# Positions of queries among the keys, ascending: a range, or int [Tq].
Positions = range | np.ndarray


class Band(NamedTuple):
    """A causal mask without an array: a query sees the keys up to its own.

    Attributes:
        positions: index of each query's own key, ascending, a range or int [Tq]; by default the
            last keys.
        window: number of keys that a query sees at most, its own included; None for all.
    """

    positions: Positions | None = None
    window: int | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """The settings of one call of attention; see `tiled_attention`."""

    scale: float
    band: Band | None
    has_sinks: bool
    tile_bytes: int


class Grid:
    """The tiles of one call: the key heads, rows of queries and keys of each."""

    def __init__(
        self, spec: AttentionSpec, arrays: tuple[mx.array, ...], sums: KeySums | None = None
    ) -> None:
        self.spec = spec
        self.q, self.k, self.v, *extra = arrays
        self.sinks = extra.pop(0) if spec.has_sinks else None
        self.mask = extra.pop() if extra else None
        self.floats = self.mask is not None and self.mask.dtype != mx.bool_  # has a gradient
        self.band = spec.band
        self.scale = spec.scale * LOG2E  # powers of 2 instead of e
        batch, heads, queries, _ = self.q.shape
        _, kv_heads, keys, _ = self.k.shape
        self.group = heads // kv_heads
        self.positions: Positions = range(keys - queries, keys)
        if self.band and self.band.positions is not None:
            self.positions = self.band.positions
        # As many whole heads as fit, or square tiles of one head.
        scores = max(1, spec.tile_bytes // (4 * self.group))
        edge = isqrt(scores)
        step = max(1, min(kv_heads, scores // (queries * keys)))
        whole = queries * keys <= scores
        self.row_tiles = _spans(queries, queries if whole else max(edge, scores // keys))
        most = keys if whole else max(edge, scores // queries)
        # The keys whose gradients are added; None for all.
        self.window: Span | None = None
        if sums is not None and sums.window is not None and self.mask is None:
            self.window = tuple(end - sums.start for end in sums.window)
        # A tile of keys does not cross the end of a piece of the sums.
        self.key_tiles = _spans(keys, most)
        if sums is not None:
            self.key_tiles = _within(keys, most, sums.start, self.window or ())
        starts = range(0, kv_heads, step)
        self.units: list[Unit] = [
            (entry, start, min(start + step, kv_heads))
            for entry in range(batch)
            for start in starts
        ]
        tiles = sum(len(self.seen(rows)) for rows in self.row_tiles)
        self.in_place = tiles >= IN_PLACE_TILES

    def seen(self, rows: Span) -> list[Span]:
        """The tiles of keys that some of these rows see."""
        if self.band is None:
            return self.key_tiles
        low, high = self.ends(rows)
        first = 0 if self.band.window is None else low - self.band.window + 1
        return [keys for keys in self.key_tiles if keys[0] <= high and keys[1] > first]

    def adds(self, keys: Span) -> bool:
        """Whether the gradients of a tile of keys are added."""
        return self.window is None or self.window[0] <= keys[0] < self.window[1]

    def ends(self, rows: Span) -> tuple[int, int]:
        """The positions of the first and the last of these rows."""
        return int(self.positions[rows[0]]), int(self.positions[rows[1] - 1])

    def rows(self, x: mx.array, unit: Unit, rows: Span, after: list[mx.array]) -> mx.array:
        """Rows of [B, H, Tq, n] as float32 [key heads, group * rows, n]."""
        entry, first, last = unit
        tile = depend_on([x[entry, first * self.group : last * self.group, slice(*rows)]], after)[0]
        return tile.astype(mx.float32).reshape(last - first, -1, x.shape[-1])

    def heads(self, tile: mx.array) -> mx.array:
        """[key heads, group * rows, n] as [heads, rows, n]."""
        return tile.reshape(tile.shape[0] * self.group, -1, tile.shape[-1])

    def scores(
        self, queries: mx.array, unit: Unit, rows: Span, keys: Span, after: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The masked scores of one tile, and its keys and values in float32."""
        entry, first, last = unit
        parts = [x[entry, first:last, slice(*keys)] for x in (self.k, self.v)]
        k, v, *hidden = depend_on(parts + self.hidden(unit, rows, keys), after)
        k, v = k.astype(mx.float32), v.astype(mx.float32)
        scores = queries @ k.swapaxes(-1, -2)
        if hidden:
            shape = (last - first, self.group, rows[1] - rows[0], keys[1] - keys[0])
            scores = (scores.reshape(shape) + self.bias(hidden[0], rows)).reshape(scores.shape)
        return scores, k, v

    def hidden(self, unit: Unit, rows: Span, keys: Span) -> list[mx.array]:
        """The input of `bias` for a tile; empty if no score of the tile is masked."""
        entry, first, last = unit
        if self.mask is not None:
            spans = (entry, entry + 1), (first * self.group, last * self.group), rows, keys
            sizes = zip(spans, self.mask.shape, strict=True)
            index = tuple(slice(*span) if size > 1 else slice(None) for span, size in sizes)
            return [self.mask[index]]
        if self.band is None:
            return []
        low, high = self.ends(rows)
        past = self.band.window is not None and keys[0] <= high - self.band.window
        return [mx.arange(*keys)] if keys[1] - 1 > low or past else []

    def bias(self, hidden: mx.array, rows: Span) -> mx.array:
        """The bias of scores [key heads, group, rows, keys]."""
        if self.mask is None:
            at = self.positions[slice(*rows)]
            at = mx.arange(at.start, at.stop) if isinstance(at, range) else mx.array(at)
            ago = at[:, None] - hidden
            window = self.band.window
            hidden = ago >= 0 if window is None else (ago >= 0) & (ago < window)
        elif hidden.shape[1] > 1:
            hidden = hidden.reshape(-1, self.group, *hidden.shape[2:])
        if hidden.dtype == mx.bool_:
            return mx.where(hidden, 0.0, MASKED)
        return mx.maximum(hidden.astype(mx.float32) * LOG2E, MASKED)

    def sink(self, unit: Unit, rows: Span) -> mx.array:
        """The sinks of these heads, [key heads, group * rows, 1]."""
        _, first, last = unit
        sinks = self.sinks[first * self.group : last * self.group].astype(mx.float32) * LOG2E
        return mx.repeat(sinks, rows[1] - rows[0]).reshape(last - first, -1, 1)

    def heads_of(self, unit: Unit) -> Span:
        """The key heads of a unit, counted over the batch."""
        entry, first, last = unit
        return entry * self.k.shape[1] + first, entry * self.k.shape[1] + last


def forward(grid: Grid) -> tuple[mx.array, mx.array]:
    """The output, and maximum and sum of the softmax [B, H, Tq, 2] in float32."""
    outputs = [HeadBuffer(grid.q, grid.v.shape[-1]), HeadBuffer(grid.q, 2, mx.float32)]
    after: list[mx.array] = []
    for unit in grid.units:
        pieces = []
        for rows in grid.row_tiles:
            after = _row_forward(grid, unit, rows, after)
            pieces.append([grid.heads(x) for x in after])
        after = [
            joined.add(list(parts), grid.in_place)
            for joined, parts in zip(outputs, zip(*pieces, strict=True), strict=True)
        ]
    return tuple(joined.result() for joined in outputs)


def _row_forward(grid: Grid, unit: Unit, rows: Span, after: list[mx.array]) -> list[mx.array]:
    queries = grid.rows(grid.q, unit, rows, after) * grid.scale
    top, total, value = mx.array(MASKED), mx.array(0.0), mx.array(0.0)
    if grid.sinks is not None:
        top, total = grid.sink(unit, rows), mx.array(1.0)
    for keys in grid.seen(rows):
        scores, _, values = grid.scores(queries, unit, rows, keys, after)
        highest = mx.maximum(top, scores.max(-1, keepdims=True))
        weights, decay = _exp2(scores - highest), _exp2(top - highest)
        total = total * decay + weights.sum(-1, keepdims=True)
        value = value * decay + weights @ values
        top, after = highest, [value, total]
    return [value / total, mx.concatenate([top, total], -1)]


def backward(
    grid: Grid,
    cotangent: mx.array,
    output: mx.array,
    statistics: mx.array,
    sums_of_keys: KeySums | None = None,
) -> list[mx.array]:
    """The gradients of q, k, v and, if there are any, sinks and a floating mask.

    Those of k and v are zeros where they are added to sums.
    """
    kept = (grid.q, grid.k, grid.v) if sums_of_keys is None else (grid.q,)
    gradients = [HeadBuffer(x, x.shape[-1]) for x in kept]
    saved = (grid.q, cotangent, output, statistics)
    after, dsinks = [cotangent], []
    dmask = MaskGradient(grid.mask) if grid.floats else None
    for unit in grid.units:
        pieces, dsink = [], mx.array(0.0)
        if sums_of_keys is None:
            sizes = grid.k.shape[-1], grid.v.shape[-1]
            sums = UnitSums(unit[2] - unit[1], grid.key_tiles, sizes)
        else:
            sums = _Added(grid, unit, sums_of_keys)
        for rows in grid.row_tiles:
            tiles = [grid.rows(x, unit, rows, after) for x in saved]
            dq, share, after = _row_backward(grid, unit, rows, tiles, sums, after, dmask)
            pieces.append(dq)
            dsink = dsink - share
        parts = [pieces, *sums.parts()]
        after = [
            joined.add(list(part), grid.in_place)
            for joined, part in zip(gradients, parts, strict=True)
        ]
        dsinks.append(dsink)
        if dmask is not None:
            dmask.end(2)
            if unit[2] == grid.k.shape[1]:
                dmask.end(1)
    results = [joined.result() for joined in gradients]
    if sums_of_keys is not None:
        results += [mx.broadcast_to(mx.zeros((), x.dtype), x.shape) for x in (grid.k, grid.v)]
    if grid.sinks is not None:
        dsink = mx.concatenate(dsinks).reshape(-1, len(grid.sinks)).sum(0)
        results.append(dsink.astype(grid.sinks.dtype))
    if dmask is not None:
        results.append(dmask.result().astype(grid.mask.dtype))
    if grid.window is not None and grid.window[0] > 0:
        product = (cotangent.astype(mx.float32) * output).sum(-1, keepdims=True)
        saved = grid.q, cotangent, mx.concatenate([statistics, product], -1)
        sums_of_keys.calls.append(KeyCall(replace(grid.spec, has_sinks=False), saved))
    return results


def add_to_keys(call: KeyCall, k: mx.array, v: mx.array, sums: KeySums) -> None:
    """Add what an earlier call gives to the gradients of the keys and values in `sums.window`.

    Args:
        call: the call.
        k, v: the keys and values that it saw, from `sums.start` on.
        sums: to which it is added, not evaluated.
    """
    grid = Grid(call.spec, (call.arrays[0], k, v), sums)
    after: list[mx.array] = []
    for unit in grid.units:
        added = _Added(grid, unit, sums)
        for rows in grid.row_tiles:
            q, dy, saved = (grid.rows(x, unit, rows, after) for x in call.arrays)
            top, total, product = mx.split(saved, 3, axis=-1)
            row = _Row(grid, q, dy / total, dy / total, top, product / total)
            for keys in filter(grid.adds, grid.seen(rows)):
                weights, dscores, _ = row.tile(unit, rows, keys, after)
                after = row.add(added, keys, weights, dscores)


class _Row:
    """The backward of one tile of queries, but for what it is added to.

    Args:
        grid: the tiles of the call.
        queries: the queries.
        cotangent: the gradient of the output, over the sum of the softmax.
        through: the same, 0 where no score counts.
        top: the maximum of the softmax.
        mean: sum of `through` times the output.
    """

    def __init__(
        self,
        grid: Grid,
        queries: mx.array,
        cotangent: mx.array,
        through: mx.array,
        top: mx.array,
        mean: mx.array,
    ) -> None:
        self._grid, self._cotangent, self._through = grid, cotangent, through
        self._top, self._mean = top, mean
        self._powers, self._natural = queries * grid.scale, queries * (grid.scale / LOG2E)

    def tile(
        self, unit: Unit, rows: Span, keys: Span, after: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The weights of a tile of keys, the gradient of its scores, and the keys."""
        scores, k, v = self._grid.scores(self._powers, unit, rows, keys, after)
        weights = _exp2(scores - self._top)
        return weights, weights * (self._through @ v.swapaxes(-1, -2) - self._mean), k

    def add(
        self, sums: "UnitSums | _Added", keys: Span, weights: mx.array, dscores: mx.array
    ) -> list[mx.array]:
        """Add this row's part of dK and dV to `sums`; returns both sums."""
        dv = sums.add(1, keys, weights.swapaxes(-1, -2) @ self._cotangent)
        return [sums.add(0, keys, dscores.swapaxes(-1, -2) @ self._natural), dv]


def _row_backward(
    grid: Grid,
    unit: Unit,
    rows: Span,
    tiles: list[mx.array],
    sums: "UnitSums | _Added",
    after: list[mx.array],
    dmask: MaskGradient | None,
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Add these rows' part of dK and dV to `sums`, and that of the mask to `dmask`.

    Returns their dQ, -1 times their part of the sinks' gradient, and the arrays that later tiles
    depend on.
    """
    queries, cotangent, output, statistics = tiles
    top, total = statistics[..., :1], statistics[..., 1:]
    cotangent = cotangent / total  # rather than dividing all probabilities
    through = cotangent
    if grid.mask is not None and not grid.floats:
        through = mx.where(top == MASKED, 0.0, cotangent)  # no score of such a row counts
    mean = (through * output).sum(-1, keepdims=True)
    share = mx.array(0.0)
    if grid.sinks is not None:
        share = grid.heads(_exp2(grid.sink(unit, rows) - top) * mean).sum((1, 2))
    row = _Row(grid, queries, cotangent, through, top, mean)
    seen = grid.seen(rows)
    dq = mx.array(0.0) if seen else mx.zeros_like(queries)
    for keys in seen:
        weights, dscores, k = row.tile(unit, rows, keys, after)
        added = row.add(sums, keys, weights, dscores) if grid.adds(keys) else []
        dq = dq + dscores @ k
        after = [dq, *added]
        if dmask is not None:
            after = [*after, dmask.add(grid.heads(dscores))]
    if dmask is not None:
        dmask.end(3)
    return grid.heads(dq * (grid.scale / LOG2E)), share, after


class _Added:
    """As `UnitSums`, but added to sums over several calls; no pieces are left."""

    def __init__(self, grid: Grid, unit: Unit, sums: KeySums) -> None:
        self._sums, self._head = sums, grid.heads_of(unit)[0]
        self._units = [grid.heads_of(other) for other in grid.units]

    def add(self, index: int, keys: Span, more: mx.array) -> mx.array:
        return self._sums.add(index, more, self._units, (self._head, keys[0]))

    def parts(self) -> list[list[mx.array]]:
        return []


def _spans(count: int, most: int) -> list[Span]:
    """Cut `count` into pieces of nearly one size, at most `most`."""
    size = -(-count // -(-count // most))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _within(count: int, most: int, start: int, more: Sequence[int]) -> list[Span]:
    """As `_spans`, without an end of a piece of `KeySums`, or one of `more`, inside.

    `start` is where keys begin.
    """
    ends = {*range(start // PIECE * PIECE - start, count, PIECE), *more}
    edges = [0, *sorted(end for end in ends if 0 < end < count), count]
    return [
        (low + first, low + last)
        for low, high in pairwise(edges)
        for first, last in _spans(high - low, most)
    ]


def _exp2(x: mx.array) -> mx.array:
    # On an x86 CPU MLX's exp takes twice the time of its power.
    return mx.exp(x / LOG2E) if mx.default_device() == mx.gpu else mx.power(2.0, x)
