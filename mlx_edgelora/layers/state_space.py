"""The state-space recurrence of Mamba 2 in chunks, with a gradient one chunk at a time.

Each head has a state S [Dh, N], which decays by a number a and adds a token's value x under the
key b; the query c reads it (arXiv 2405.21060):

    S' = a S + x b^T,   y = S' c

mlx-lm computes 256 tokens at once, with several matrices of 256 x 256 a head in its graph, and all
of them are kept for the gradient. Here a chunk has C tokens. With L_ti the product of the decays
after token i up to token t, G_t that of all up to t, and S0 the state before the chunk, as rows:

    Y = (C B^T . L) X + G (C S0^T),   S_C = G_C S0 + (L_C X)^T B

L is the exponential of a sum of logarithms of one sign, so nothing cancels. All of it in float32.
Keys and queries are shared by the heads of a group. Memory: `layers/chunks.py`, with a graph of
about 8 arrays of B H C^2 numbers. Time: O(T (C + N) Dh) a head.
"""

import mlx.core as mx

from mlx_edgelora.layers.chunks import in_chunks

__all__ = ["CHUNK", "state_space"]

CHUNK = 64  # tokens of a chunk


def state_space(
    x: mx.array,
    log_decay: mx.array,
    keys: mx.array,
    queries: mx.array,
    state: mx.array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """The recurrence over T tokens.

    Args:
        x: values [B, T, H, Dh].
        log_decay: logarithms of the decays, none positive: [B, T, H].
        keys, queries: [B, T, G, N]; G divides H.
        state: [B, H, Dh, N]; zeros if None.
        chunk: tokens of a chunk.

    Returns:
        y [B, T, H, Dh] and the last state, both float32 and differentiable in all arrays.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    heads, size = (*x.shape[:2], x.shape[2]), (x.shape[0], *x.shape[2:], keys.shape[-1])
    shared = keys.shape == queries.shape and keys.shape[:2] == x.shape[:2]
    if not shared or log_decay.shape != heads or x.shape[2] % keys.shape[2]:
        shapes = f"{x.shape}, {log_decay.shape}, {keys.shape} and {queries.shape}"
        raise ValueError(f"Batch, tokens, heads or groups do not match: {shapes}.")
    if state is None:
        state = mx.zeros(size, mx.float32)
    elif state.shape != size:
        raise ValueError(f"A state is {size}; got {state.shape}.")
    y, last, _ = in_chunks(_chunk, chunk)(state, x, log_decay, keys, queries)
    return y, last


def _chunk(
    state: mx.array, x: mx.array, log_decay: mx.array, keys: mx.array, queries: mx.array
) -> tuple[mx.array, mx.array]:
    """y and the state after a chunk, as the module says; [B, G, H / G, ...] within."""
    rows, count, heads, size = x.shape
    groups = keys.shape[2]
    per = heads // groups
    x = x.astype(mx.float32).reshape(rows, count, groups, per, size).transpose(0, 2, 3, 1, 4)
    log_decay = log_decay.astype(mx.float32).reshape(rows, count, groups, per)
    log_decay = log_decay.transpose(0, 2, 3, 1)  # [B, G, H / G, C]
    keys, queries = (a.astype(mx.float32).swapaxes(1, 2)[:, :, None] for a in (keys, queries))
    before = state.reshape(rows, groups, per, size, -1)
    tokens = mx.arange(count)
    after = mx.where(tokens[:, None] > tokens, log_decay[..., :, None], 0.0)
    between = mx.exp(mx.cumsum(after, axis=-2))  # [.., t, i]: the decays after i up to t
    scores = mx.where(tokens[:, None] >= tokens, queries @ keys.swapaxes(-1, -2) * between, 0.0)
    so_far = mx.exp(mx.cumsum(log_decay, axis=-1))[..., None]
    y = scores @ x + so_far * (queries @ before.swapaxes(-1, -2))
    left = between[..., -1, :, None] * x
    last = so_far[..., -1:, :] * before + left.swapaxes(-1, -2) @ keys
    return y.transpose(0, 3, 1, 2, 4).reshape(rows, count, heads, size), last.reshape(state.shape)
