"""The gated delta rule in chunks, with a gradient that recomputes one chunk at a time.

Each head has a state S [Dv, Dk], which decays by g, forgets what it holds under the key k and
learns the value v with the strength beta (arXiv 2412.06464; a decay for each channel is Kimi
Delta Attention, arXiv 2510.26692):

    S' = S diag(g),   S = S' + beta (v - S' k) k^T,   y = S q

A loop over tokens, as mlx-lm's `gated_delta_ops`, saves several states a token for its gradient.
Here C tokens are computed at once (the WY representation, section 3.3 of the paper). With D_ti the
product of the decays after token i up to token t, G_t that of all up to t, and S0 the state before
the chunk, all as rows:

    A_ti = beta_t (k_t D_ti . k_i)  for i < t,    (I + A) U = beta (V - (G K) S0^T)
    Y = (G Q) S0^T + (q_t D_ti . k_i)_{i <= t} U,    S_C = S0 diag(G_C) + U^T (D_C K)

Decays are multiplied, never divided or subtracted as logarithms, so strong ones neither overflow
nor cancel. The inverse of I + A is built from blocks that double in size. Each of them is an
inverse itself, whereas powers of A grow without bound if keys repeat.

All of it in float32. Time: O(T (C + Dk) Dv) a head, in matrix products. Memory and the gradient:
`layers/chunks.py`, with states of 4 B Hv Dv Dk bytes. A decay for each channel needs C x C x Dk
numbers a head, therefore C is smaller.
"""

import mlx.core as mx

from mlx_edgelora.layers.chunks import in_chunks

__all__ = ["CHUNK", "gated_delta"]

# Tokens of a chunk, for one decay a head and for one a channel.
CHUNK = (64, 16)
# The smallest decay. Smaller ones forget as much in float32, and the gradient divides by them.
TINY = 1e-30


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    chunk: int | None = None,
) -> tuple[mx.array, mx.array]:
    """The gated delta rule over T tokens, as mlx-lm's `gated_delta_ops`, in chunks.

    Args:
        q, k: [B, T, Hk, Dk]; Hk divides Hv.
        v: [B, T, Hv, Dv].
        g: decays between 0 and 1: [B, T, Hv], or [B, T, Hv, Dk] for one a channel.
        beta: [B, T, Hv].
        state: [B, Hv, Dv, Dk]; zeros if None.
        mask: bool [B, T]; a token where it is False leaves the state as it is.
        chunk: tokens of a chunk; `CHUNK` if None.

    Returns:
        y [B, T, Hv, Dv] in the dtype of `q` and the last state [B, Hv, Dv, Dk] in the common dtype
        of `state` and the other arrays, both differentiable in all arrays but the mask.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check(q, k, v, g, beta, state, mask)
    if state is None:
        state = mx.zeros((q.shape[0], *v.shape[2:], q.shape[3]), mx.float32)
    size = CHUNK[g.ndim - 3] if chunk is None else chunk
    masks = () if mask is None else (mask,)
    y, last, _ = in_chunks(_chunk, size)(state, q, k, v, g, beta, *masks)
    return y, last.astype(mx.result_type(state, g, k, v, beta))


def _check(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None,
    mask: mx.array | None,
) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, g {g.shape}, beta {beta.shape}"
    if {q.ndim, v.ndim} != {4} or 0 in (q.size, v.size) or v.shape[2] % q.shape[2]:
        raise ValueError(f"q and v need 4 axes, none empty, and heads that divide; got {shapes}.")
    heads = *q.shape[:2], v.shape[2]
    fits = k.shape == q.shape and v.shape[:2] == q.shape[:2] and beta.shape == heads
    if not fits or g.shape not in (heads, (*heads, q.shape[3])):
        raise ValueError(f"Batch, tokens, heads or head sizes do not match: {shapes}.")
    full = q.shape[0], *v.shape[2:], q.shape[3]
    if state is not None and state.shape != full:
        raise ValueError(f"A state is {full}; got {state.shape}.")
    if mask is not None and (mask.shape != q.shape[:2] or mask.dtype != mx.bool_):
        raise ValueError(f"A mask is bool {q.shape[:2]}; got {mask.dtype} {mask.shape}.")


def _chunk(
    state: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """y and the state after a chunk, as the module says; [B, Hk, Hv / Hk, C, ...] within."""
    dtype, heads = q.dtype, k.shape[2]
    q, k, v, g, beta = (_by_head(array, heads) for array in (q, k, v, g, beta))
    before = state.reshape(*v.shape[:3], *state.shape[2:]).swapaxes(-1, -2)  # [.., Dk, Dv]
    g = g + mx.stop_gradient(mx.maximum(g, TINY) - g)
    kept, own = g, None
    if mask is not None:
        # A masked token reads the state that it would make, with its own decay, and drops it.
        seen = mask[:, None, None, :, None]
        kept, own = mx.where(seen, g, 1.0), mx.where(seen, 1.0, g)
    to_now, to_end, between = _decays(kept)
    if own is not None:
        to_now, to_end = to_now * own, mx.where(seen, to_end, 0.0)
        between = mx.where(seen[..., None, :, :], between * own[..., :, None, :], 0.0)
    keys, queries = _scores(k, q, between)
    u, _ = _solve(beta * keys, beta * (v - (to_now * k) @ before))
    y = (to_now * q) @ before + (queries + (q * k).sum(-1, keepdims=True) * mx.eye(k.shape[-2])) @ u
    through = mx.prod(kept, axis=-2)[..., None]  # [.., Dk or 1, 1]
    after = through * before + (to_end * k).swapaxes(-1, -2) @ u
    y = y.transpose(0, 3, 1, 2, 4).reshape(y.shape[0], y.shape[3], -1, y.shape[-1])
    return y.astype(dtype), after.swapaxes(-1, -2).reshape(state.shape)


def _by_head(array: mx.array, heads: int) -> mx.array:
    """[B, C, H, n], or without n, as [B, heads, H / heads, C, n] in float32, with n = 1."""
    rows, tokens = array.shape[:2]
    size = array.shape[3] if array.ndim == 4 else 1
    shaped = array.astype(mx.float32).reshape(rows, tokens, heads, -1, size)
    return shaped.transpose(0, 2, 3, 1, 4)


def _decays(g: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Products of decays [.., C, n]: from the start to t, after t to the end, and after i to t.

    The last one is [.., t, i, n], and zero unless i < t.
    """
    tokens = mx.arange(g.shape[-2])
    later = (tokens[:, None] > tokens)[..., None]
    between = mx.cumprod(mx.where(later, g[..., :, None, :], 1.0), axis=-3)
    return mx.cumprod(g, axis=-2), between[..., -1, :, :], mx.where(later, between, 0.0)


def _scores(k: mx.array, q: mx.array, between: mx.array) -> tuple[mx.array, mx.array]:
    """Products of keys, and of queries, with the decayed keys of earlier tokens: [.., t, i]."""
    if between.shape[-1] == 1:
        between, transposed = between[..., 0], k.swapaxes(-1, -2)
        return (k @ transposed) * between, (q @ transposed) * between
    decayed = between * k[..., None, :, :]
    both = decayed @ mx.stack([k, q], axis=-1)
    return both[..., 0], both[..., 1]


@mx.custom_function
def _solve(lower: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
    """The solution of (I + lower) U = right for a strictly lower triangle, and the inverse."""
    inverse = _inverse(lower)
    return inverse @ right, inverse


@_solve.vjp
def _solve_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple
) -> tuple[mx.array, mx.array]:
    right = outputs[1].swapaxes(-1, -2) @ cotangents[0]
    return mx.tril(-right @ outputs[0].swapaxes(-1, -2), -1), right


def _inverse(lower: mx.array) -> mx.array:
    """The inverse of I + lower, from the inverses of the diagonal's blocks of 1, 2, 4, ..."""
    count = lower.shape[-1]
    tokens, size, inverse = mx.arange(count), 1, mx.eye(count)
    while size < count:
        block = tokens // size
        # The lower left quarter of each block of twice the size.
        corner = (block[:, None] == block + 1) & (block % 2 == 0)
        part = mx.where(corner, lower, 0.0)
        inverse = inverse - (part if size == 1 else inverse @ part @ inverse)
        size *= 2
    return inverse
