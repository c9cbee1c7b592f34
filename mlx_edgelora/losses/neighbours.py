"""Find the nearest tokens of a token by the cosine similarity of rows of the head.

Rows are compared tile by tile and only the k nearest so far are kept, so no array of tokens x
vocabulary exists.
"""

import mlx.core as mx

from mlx_edgelora.losses.exact import TILE_BYTES
from mlx_edgelora.losses.head import Head, Tile, add_row_sum

# Number of tokens for which the head is unpacked once.
QUERIES = 256


def nearest(head: Head, tokens: mx.array, k: int, tile_bytes: int = TILE_BYTES) -> mx.array:
    """Find the k nearest tokens of each token, by the cosine similarity of rows of the head.

    Args:
        head: see `Head`; its adapter and biases are ignored. Rows shorter than 1e-10 count as
            zero and are similar only to themselves.
        tokens: int [n], at least one and at most a few hundred; the head is read once for all.
        k: number of nearest tokens, from 1 to the size of the vocabulary.
        tile_bytes: upper bound on the bytes of a tile of rows and of its similarities.

    Returns:
        int32 [n, k], evaluated, nearest first; the first is the token itself.

    Raises:
        ValueError: k or a token is out of the range of the vocabulary.

    Memory: about three times `tile_bytes`, and 32 n k bytes.
    """
    if not 1 <= k <= head.vocabulary:
        raise ValueError(f"k: got {k}, expected 1 to {head.vocabulary}, the vocabulary of the head")
    if not tokens.size or tokens.min().item() < 0 or tokens.max().item() >= head.vocabulary:
        raise ValueError(
            f"tokens: got {tokens.tolist()[:10]}, expected some from 0 to {head.vocabulary - 1}, "
            "the vocabulary of the head"
        )
    wanted = _directions(head.unpack(head.take(tokens)))
    count = tokens.size
    best = mx.full((count, 0), -mx.inf)
    names = mx.zeros((count, 0), mx.int32)
    rows = max(1, min(tile_bytes // (4 * head.dims), tile_bytes // (8 * count)))
    for start in range(0, head.vocabulary, rows):
        stop = min(start + rows, head.vocabulary)
        tile = _directions(head.unpack(head.slice(start, stop)))
        here = mx.broadcast_to(mx.arange(start, stop, dtype=mx.int32), (count, stop - start))
        # A token is nearest to itself, even if another row is equal.
        alike = mx.where(here == tokens[:, None], mx.inf, wanted @ tile.T)
        best = mx.concatenate([best, alike], axis=1)
        names = mx.concatenate([names, here], axis=1)
        del tile, alike, here
        if best.shape[1] > k:
            keep = mx.argpartition(-best, k - 1, axis=1)[:, :k]
            best = mx.take_along_axis(best, keep, axis=1)
            names = mx.take_along_axis(names, keep, axis=1)
            del keep
        mx.eval(best, names)
    result = mx.take_along_axis(names, mx.argsort(-best, axis=1), axis=1)
    mx.eval(result)
    return result


def _directions(tile: Tile) -> mx.array:
    return tile.weight * mx.rsqrt(mx.square(tile.weight).sum(axis=-1, keepdims=True) + 1e-20)


def row_sum(head: Head, tile_bytes: int = TILE_BYTES) -> Tile:
    """Sum of all rows of a head as a tile of one row, float32 [1, dims]. Reads the head once."""
    total, rows = None, max(1, tile_bytes // (8 * head.dims))
    for start in range(0, head.vocabulary, rows):
        tile = head.unpack(head.slice(start, min(start + rows, head.vocabulary)))
        total = add_row_sum(total, tile)
        del tile
        mx.eval([a for a in (total.weight, total.bias) if a is not None])
    return total
