"""Attention whose forward and backward never hold tokens x tokens.

The algorithm is FlashAttention's (arXiv 2205.14135 and 2307.08691) in plain MLX
operations. Forward: for one tile of queries after the other, over the tiles of keys it may
see, with running maximum and sum of the softmax. Backward: the probabilities P of a tile
are computed again from those two, and with D = rowsum(dO * O)

    dV += P^T dO,   dS = P * (dO V^T - D),   dQ += dS K * scale,   dK += dS^T Q * scale.

All of it in float32, whatever the inputs are. Keys and values are never repeated for the
query heads that share them; tiles that a causal mask or a window hides are not computed.

Time: O(Tq Tk), one product Q K^T more than autodiff has. Memory beside the output and the
gradients, with G = H / Hkv query heads to a key head:

    10 (tile_bytes + 4 G sqrt(tile_bytes / 4G) max(D, Dv)) + 8 (G Tq D + Tk (D + Dv)) bytes

at most: scores and rows of some tiles, because MLX allocates about 50 operations ahead of
what it runs (each tile waits for the one before by `mx.depends`); and one key head's
results in float32, twice. Those are written into the output in place, for which MLX must be
done with all that reads the output: it is, given enough operations between. With fewer
tiles a head than that takes, heads do not wait for one another to be written, and output
and gradients may be held twice, as concatenating would.

Saved are the maximum and the sum, not their log-sum-exp: in a row whose keys are all
masked it forgets how many they are.

Not optimal yet: of tiles on the causal diagonal half is computed for nothing; a single
key head (B * Hkv = 1) is held twice.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import e, isqrt, log2
from typing import NamedTuple

import mlx.core as mx

# One tile of scores. At 24 heads of 128 and 2048 tokens 1 to 8 MiB took the same time.
TILE_BYTES = 2**20
# So many tiles of a head are more operations than MLX allocates ahead (measured: 1 is not).
IN_PLACE_TILES = 3
LOG2E = log2(e)
MASKED = mx.finfo(mx.float32).min
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Head sizes (of q and k, of v) for which MLX's Metal kernels have a backward.
METAL_SIZES = {(size, size) for size in (64, 72, 80, 96, 128, 192, 256)} | {(96, 64)}

Mask = str | mx.array | None
Span = tuple[int, int]
Unit = tuple[int, int, int]  # batch entry, first key head, last key head + 1


def tiled_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Mask = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    tile_bytes: int = TILE_BYTES,
) -> mx.array:
    """Exact attention, as `mx.fast.scaled_dot_product_attention`, in tiles.

    Args:
        q: [B, H, Tq, D], float32, float16 or bfloat16.
        k, v: [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv] of the same dtype; Hkv divides H.
        scale: factor of the scores.
        mask: "causal" (the last query sees the last key; Tq <= Tk), or an array that
            broadcasts to [B, H, Tq, Tk]: bool (True is seen) or floating (added). It gets
            no gradient: zeros. A row that sees nothing is the mean of `v`, as in MLX; -inf
            throughout a row does the same here, and is NaN in MLX.
        window: with "causal", each query sees this many keys, its own among them.
        sinks: [H], one more logit for each head that has no value.
        tile_bytes: bound on one tile of float32 scores, at least one score for each query
            head that shares a key head.

    Returns:
        [B, H, Tq, Dv] in the dtype of `q`, differentiable in `q`, `k`, `v` and `sinks`.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
    """
    _check(q, k, v, mask, window, sinks, tile_bytes)
    causal = isinstance(mask, str)
    extra = [] if sinks is None else [sinks]
    if mask is not None and not causal:
        extra.append(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    setting = _Setting(float(scale), causal, window, sinks is not None, int(tile_bytes))
    return _attention(setting)(q, k, v, *extra)[0]


def attention_forward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    tile_bytes: int = TILE_BYTES,
) -> tuple[mx.array, mx.array]:
    """The same outside of traces, with what `attention_backward` needs.

    Returns:
        The output, and maximum and sum of the softmax, float32 [B, H, Tq, 2].
    """
    _check(q, k, v, mask, None, sinks, tile_bytes)
    return _forward(_grid(q, k, v, scale, mask, sinks, tile_bytes))


def attention_backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    output: mx.array,
    statistics: mx.array,
    cotangent: mx.array,
    *,
    scale: float,
    mask: Mask,
    tile_bytes: int = TILE_BYTES,
) -> list[mx.array]:
    """The gradients of q, k and v through some of the keys a query sees.

    Args:
        q, k, v, scale, mask, tile_bytes: as of `tiled_attention`; keys and values may be a
            part of those that made `output`, and the mask is theirs. Over all parts the
            gradients of q add up.
        output, statistics: of `attention_forward` over all keys.
        cotangent: of the output.
    """
    _check(q, k, v, mask, None, None, tile_bytes)
    grid = _grid(q, k, v, scale, mask, None, tile_bytes)
    return _backward(grid, cotangent, output, statistics)


def _grid(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    tile_bytes: int,
) -> "_Grid":
    extra = [] if sinks is None else [sinks]
    if mask is not None and not isinstance(mask, str):
        extra.append(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    causal = isinstance(mask, str)
    setting = _Setting(float(scale), causal, None, sinks is not None, int(tile_bytes))
    return _Grid(setting, (q, k, v, *extra))


class Backend(NamedTuple):
    """What decides whether MLX has a fused kernel: "cpu", "metal" or "cuda", and versions."""

    name: str
    mlx: tuple[int, ...]
    compute_capability: int = 0  # CUDA's major one

    @classmethod
    def here(cls) -> "Backend":
        """That of the default device."""
        version = tuple(int(part) for part in mx.__version__.split(".")[:3] if part.isdigit())
        if mx.default_device() != mx.gpu:
            return cls("cpu", version)
        if mx.metal.is_available():
            return cls("metal", version)
        return cls("cuda", version, int(mx.device_info().get("compute_capability_major", 0)))


def use_fused(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: Mask = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    backend: Backend | None = None,
) -> tuple[bool, str]:
    """Whether MLX's own attention has a fused forward *and* backward here, and why (not).

    Arguments as of `tiled_attention`; only shapes and dtypes are looked at. Where this is
    False MLX's gradient may build tokens x tokens scores without a word.
    """
    backend = backend or Backend.here()
    if backend.name not in ("metal", "cuda"):
        return False, f"MLX has no fused attention gradient on {backend.name}"
    rows, keys, sizes = q.shape[2], k.shape[2], (q.shape[3], v.shape[3])
    causal = isinstance(mask, str)
    refusals = {
        "the fused backward gives no gradient to sinks": sinks is not None,
        "a window is an array mask to MLX": window is not None,
        f"causal with {rows} queries and {keys} keys": causal and rows > keys,
    }
    if backend.name == "metal":
        refusals |= {
            f"mlx {'.'.join(map(str, backend.mlx))} is before 0.32.4": backend.mlx < (0, 32, 4),
            "the fused backward takes no array mask": mask is not None and not causal,
            f"head sizes {sizes}": sizes not in METAL_SIZES,
            f"{rows} queries, not more than 8": rows <= 8,
        }
    else:
        refusals |= {
            f"compute capability {backend.compute_capability}": backend.compute_capability < 8,
            f"{q.dtype}, not 16 bits": q.dtype not in (mx.float16, mx.bfloat16),
            f"head sizes {sizes}": max(sizes) > 128 or any(size % 8 for size in sizes),
            f"{rows} queries, no multiple of 128": rows % 128 != 0,
        }
    for reason, refused in refusals.items():
        if refused:
            return False, reason
    return True, f"MLX's fused attention on {backend.name} has this gradient"


def _check(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: Mask,
    window: int | None,
    sinks: mx.array | None,
    tile_bytes: int,
) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if {q.ndim, k.ndim, v.ndim} != {4} or 0 in (q.size, k.size, v.size):
        raise ValueError(f"Attention needs q, k and v of 4 axes, none empty; got {shapes}.")
    if k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"Batch, heads, keys or head sizes do not match: {shapes}.")
    if {k.dtype, v.dtype} != {q.dtype} or q.dtype not in DTYPES:
        raise ValueError(f"q, k, v must share a float dtype; got {q.dtype}, {k.dtype}, {v.dtype}.")
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], k.shape[2]))
    if window is not None and (not isinstance(mask, str) or window < 1):
        raise ValueError(f'A window is 1 or more, with mask="causal"; got {window}.')
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"Sinks are one for each of {q.shape[1]} heads; got {sinks.shape}.")
    if tile_bytes < 1:
        raise ValueError(f"A tile has 1 byte or more; got {tile_bytes}.")


def _check_mask(mask: str | mx.array, full: tuple[int, ...]) -> None:
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'A mask is "causal", an array or None; got "{mask}".')
        if full[2] > full[3]:
            raise ValueError(f"Causal needs no more queries than keys; got {full[2]}, {full[3]}.")
        return
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.ndim > 4 or any(size not in (1, most) for size, most in sizes):
        raise ValueError(f"A mask of {mask.shape} does not broadcast to {full}.")
    if mask.dtype not in (mx.bool_, *DTYPES):
        raise ValueError(f"A mask is bool or floating; got {mask.dtype}.")


@dataclass(frozen=True)
class _Setting:
    scale: float
    causal: bool
    window: int | None
    has_sinks: bool
    tile_bytes: int


@lru_cache(maxsize=256)
def _attention(setting: _Setting) -> mx.custom_function:
    @mx.custom_function
    def attention(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(_Grid(setting, arrays))

    @attention.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple
    ) -> list[mx.array]:
        grid = _Grid(setting, primals)
        gradients = _backward(grid, cotangents[0], *outputs)
        return gradients if grid.mask is None else [*gradients, mx.zeros_like(grid.mask)]

    return attention


class _Grid:
    """The tiles of one call: which key heads, rows of queries and keys are taken together."""

    def __init__(self, setting: _Setting, arrays: tuple[mx.array, ...]) -> None:
        self.q, self.k, self.v, *extra = arrays
        self.sinks = extra.pop(0) if setting.has_sinks else None
        self.mask = extra.pop() if extra else None
        self.causal, self.window = setting.causal, setting.window
        self.scale = setting.scale * LOG2E  # powers of 2 instead of e
        batch, heads, queries, _ = self.q.shape
        _, kv_heads, keys, _ = self.k.shape
        self.group = heads // kv_heads
        self.offset = keys - queries
        # As many whole heads as fit, or square tiles of one head.
        scores = max(1, setting.tile_bytes // (4 * self.group))
        edge = isqrt(scores)
        step = max(1, min(kv_heads, scores // (queries * keys)))
        whole = queries * keys <= scores
        self.row_tiles = _spans(queries, queries if whole else max(edge, scores // keys))
        self.key_tiles = _spans(keys, keys if whole else max(edge, scores // queries))
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
        if not self.causal:
            return self.key_tiles
        stop = rows[1] + self.offset
        first = 0 if self.window is None else rows[0] + self.offset - self.window + 1
        return [keys for keys in self.key_tiles if keys[0] < stop and keys[1] > first]

    def rows(self, x: mx.array, unit: Unit, rows: Span, after: list[mx.array]) -> mx.array:
        """Rows of [B, H, Tq, n] as float32 [key heads, group * rows, n]."""
        entry, first, last = unit
        tile = _wait([x[entry, first * self.group : last * self.group, slice(*rows)]], after)[0]
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
        k, v, *hidden = _wait(parts + self.hidden(unit, rows, keys), after)
        k, v = k.astype(mx.float32), v.astype(mx.float32)
        scores = queries @ k.swapaxes(-1, -2)
        if hidden:
            shape = (last - first, self.group, rows[1] - rows[0], keys[1] - keys[0])
            scores = (scores.reshape(shape) + self.bias(hidden[0], rows)).reshape(scores.shape)
        return scores, k, v

    def hidden(self, unit: Unit, rows: Span, keys: Span) -> list[mx.array]:
        """What `bias` is made from, if any score of a tile is to be masked."""
        entry, first, last = unit
        if self.mask is not None:
            spans = (entry, entry + 1), (first * self.group, last * self.group), rows, keys
            sizes = zip(spans, self.mask.shape, strict=True)
            index = tuple(slice(*span) if size > 1 else slice(None) for span, size in sizes)
            return [self.mask[index]]
        low, high = rows[0] + self.offset, rows[1] - 1 + self.offset
        past = self.window is not None and keys[0] <= high - self.window
        return [mx.arange(*keys)] if self.causal and (keys[1] - 1 > low or past) else []

    def bias(self, hidden: mx.array, rows: Span) -> mx.array:
        """What is added to scores [key heads, group, rows, keys]."""
        if self.mask is None:
            ago = mx.arange(rows[0] + self.offset, rows[1] + self.offset)[:, None] - hidden
            hidden = ago >= 0 if self.window is None else (ago >= 0) & (ago < self.window)
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

    def zeros(self, unit: Unit) -> dict[Span, list[mx.array]]:
        """The sums of dK and dV for each tile of keys, still empty."""
        heads, sizes = unit[2] - unit[1], (self.k.shape[-1], self.v.shape[-1])
        return {
            keys: [mx.zeros((heads, keys[1] - keys[0], size)) for size in sizes]
            for keys in self.key_tiles
        }


def _forward(grid: _Grid) -> tuple[mx.array, mx.array]:
    """The output, and maximum and sum of the softmax [B, H, Tq, 2] in float32."""
    outputs = [_Joined(grid.q, grid.v.shape[-1]), _Joined(grid.q, 2, mx.float32)]
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


def _row_forward(grid: _Grid, unit: Unit, rows: Span, after: list[mx.array]) -> list[mx.array]:
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


def _backward(
    grid: _Grid, cotangent: mx.array, output: mx.array, statistics: mx.array
) -> list[mx.array]:
    """The gradients of q, k, v and, if there are any, sinks."""
    gradients = [_Joined(x, x.shape[-1]) for x in (grid.q, grid.k, grid.v)]
    saved = (grid.q, cotangent, output, statistics)
    after, dsinks = [cotangent], []
    for unit in grid.units:
        pieces, dsink = [], mx.array(0.0)
        sums = grid.zeros(unit)
        for rows in grid.row_tiles:
            tiles = [grid.rows(x, unit, rows, after) for x in saved]
            dq, share, after = _row_backward(grid, unit, rows, tiles, sums, after)
            pieces.append(dq)
            dsink = dsink - share
        parts = [pieces, *zip(*sums.values(), strict=True)]
        after = [
            joined.add(list(part), grid.in_place)
            for joined, part in zip(gradients, parts, strict=True)
        ]
        dsinks.append(dsink)
    results = [joined.result() for joined in gradients]
    if grid.sinks is not None:
        dsink = mx.concatenate(dsinks).reshape(-1, len(grid.sinks)).sum(0)
        results.append(dsink.astype(grid.sinks.dtype))
    return results


def _row_backward(
    grid: _Grid,
    unit: Unit,
    rows: Span,
    tiles: list[mx.array],
    sums: dict[Span, list[mx.array]],
    after: list[mx.array],
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Add these rows' part of dK and dV to `sums`.

    Returns their dQ, -1 times their part of the sinks' gradient, and what to wait for.
    """
    queries, cotangent, output, statistics = tiles
    top, total = statistics[..., :1], statistics[..., 1:]
    cotangent = cotangent / total  # rather than dividing all probabilities
    through = cotangent
    if grid.mask is not None and grid.mask.dtype == mx.bool_:
        through = mx.where(top == MASKED, 0.0, cotangent)  # no score of such a row counts
    mean = (through * output).sum(-1, keepdims=True)
    share = mx.array(0.0)
    if grid.sinks is not None:
        share = grid.heads(_exp2(grid.sink(unit, rows) - top) * mean).sum((1, 2))
    powers, natural = queries * grid.scale, queries * (grid.scale / LOG2E)
    dq = mx.array(0.0)
    for keys in grid.seen(rows):
        scores, k, v = grid.scores(powers, unit, rows, keys, after)
        weights = _exp2(scores - top)
        dk, dv = sums[keys]
        dv = dv + weights.swapaxes(-1, -2) @ cotangent
        dscores = weights * (through @ v.swapaxes(-1, -2) - mean)
        dk = dk + dscores.swapaxes(-1, -2) @ natural
        dq = dq + dscores @ k
        sums[keys], after = [dk, dv], [dq, dk, dv]
    return grid.heads(dq * (grid.scale / LOG2E)), share, after


class _Joined:
    """An array like `like` but for its last axis, filled by [heads, rows, size] in turn."""

    def __init__(self, like: mx.array, size: int, dtype: mx.Dtype | None = None) -> None:
        self.shape = (*like.shape[:3], size)
        self.whole = mx.zeros((self.shape[0] * self.shape[1], *self.shape[2:]), dtype or like.dtype)
        self.filled = 0

    def add(self, pieces: list[mx.array], wait: bool) -> mx.array:
        """Write the next heads, given in pieces of their rows; returns what to wait for."""
        heads = mx.concatenate(pieces, axis=1).astype(self.whole.dtype)
        self.whole[self.filled : self.filled + len(heads)] = heads
        self.filled += len(heads)
        return self.whole if wait else heads

    def result(self) -> mx.array:
        return self.whole.reshape(self.shape)


def _spans(count: int, most: int) -> list[Span]:
    """Cut `count` into pieces of nearly one size, at most `most`."""
    size = -(-count // -(-count // most))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _wait(arrays: list[mx.array], after: list[mx.array]) -> list[mx.array]:
    """The same arrays, usable when `after` is there.

    Only so is one tile alive after the other; and a compiled graph cannot merge what the
    backward makes from them with the same thing in the forward, and keep that in between.
    """
    return mx.depends(arrays, after) if after else arrays


def _exp2(x: mx.array) -> mx.array:
    # On an x86 CPU MLX's exp takes twice the time of its power.
    return mx.exp(x / LOG2E) if mx.default_device() == mx.gpu else mx.power(2.0, x)
