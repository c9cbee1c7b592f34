"""Exact cross-entropy of which only a tile of the logits exists at any time.

`streamed_cross_entropy` goes over vocabulary tiles twice: once for the logarithm of
the sum of exponentials (running maximum and sum, as in online softmax, arXiv
1805.02867), once for the gradient with respect to the hidden states. It reads the head
twice and multiplies by it three times; a single pass is possible and not done yet.
`chunked_cross_entropy` goes over tokens with the whole vocabulary, for heads of which no
tile can be taken or that are trained themselves.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Tile:
    """Rows `start` to `stop` of the vocabulary.

    Attributes:
        project: hidden states [n, hidden] -> logits [n, stop - start].
    """

    start: int
    stop: int
    project: Callable[[mx.array], mx.array]


def streamed_cross_entropy(
    hidden: mx.array, labels: mx.array, tiles: Callable[[], Iterable[Tile]], gradient: bool = True
) -> tuple[mx.array, mx.array | None]:
    """Mean cross-entropy and its gradient, evaluated tile by tile.

    Args:
        hidden: [n, hidden], evaluated.
        labels: int [n], below the vocabulary's size.
        tiles: begins a new pass over tiles that cover the vocabulary once.
        gradient: compute the gradient too.

    Returns:
        The loss, float32 [], and its gradient [n, hidden] in the dtype of `hidden` or None.

    Memory: about four float32 arrays of n x tile, one float32 [n, hidden] and the tile.
    """
    peak = mx.full(labels.shape, -mx.inf)
    total, target = mx.zeros(labels.shape), mx.zeros(labels.shape)
    for tile in tiles():
        logits = tile.project(hidden).astype(mx.float32)
        local, inside = _local(labels, tile)
        picked = mx.take_along_axis(logits, mx.where(inside, local, 0)[:, None], axis=-1)
        higher = mx.maximum(peak, logits.max(axis=-1))
        total = total * mx.exp(peak - higher) + mx.exp(logits - higher[:, None]).sum(axis=-1)
        target = mx.where(inside, picked[:, 0], target)
        peak = higher
        del logits, picked, higher
        mx.eval(peak, total, target)
    # Kept apart: added to a large maximum the logarithm would lose its digits.
    spread = mx.log(total)
    loss = ((peak - target) + spread).mean()
    mx.eval(loss, spread)
    if not gradient:
        return loss, None
    return loss, _gradient(hidden, labels, tiles, peak, spread)


def _gradient(
    hidden: mx.array,
    labels: mx.array,
    tiles: Callable[[], Iterable[Tile]],
    peak: mx.array,
    spread: mx.array,
) -> mx.array:
    result = mx.zeros(hidden.shape, mx.float32)
    for tile in tiles():

        def weighted(hidden: mx.array, tile: Tile = tile) -> mx.array:
            logits = tile.project(hidden).astype(mx.float32)
            local, _ = _local(labels, tile)
            expected = mx.arange(tile.stop - tile.start) == local[:, None]
            # d loss / d logits, as a constant: the gradient of the sum is then its product
            # with everything between hidden states and logits (norm, scaling, capping).
            share = mx.exp((logits - peak[:, None]) - spread[:, None])
            error = (share - expected) / labels.size
            return (mx.stop_gradient(error) * logits).sum()

        result = result + mx.grad(weighted)(hidden).astype(mx.float32)
        mx.eval(result)
    return result.astype(hidden.dtype)


def _local(labels: mx.array, tile: Tile) -> tuple[mx.array, mx.array]:
    inside = (labels >= tile.start) & (labels < tile.stop)
    return labels - tile.start, inside


def chunked_cross_entropy(
    hidden: mx.array,
    labels: mx.array,
    project: Callable[[mx.array, Arrays], mx.array],
    trained: Arrays,
    rows: int,
    gradient: bool = True,
) -> tuple[mx.array, mx.array | None, Arrays]:
    """Mean cross-entropy over chunks of tokens, with gradients of the head's own parameters.

    Args:
        hidden: [n, hidden], evaluated.
        labels: int [n].
        project: hidden states [m, hidden] and trained parameters -> logits [m, vocabulary].
        trained: parameters of the projection that get a gradient, by name.
        rows: tokens per chunk.
        gradient: compute gradients too.

    Returns:
        The loss, float32 []; its gradient [n, hidden] or None; those of `trained`.

    Memory: about four arrays of rows x vocabulary, and the gradients.
    """

    def chunk_loss(hidden: mx.array, trained: Arrays, labels: mx.array) -> mx.array:
        logits = project(hidden, trained).astype(mx.float32)
        return nn.losses.cross_entropy(logits, labels, reduction="sum")

    loss = mx.array(0.0)
    pieces: list[mx.array] = []
    gradients = {name: mx.zeros(value.shape, value.dtype) for name, value in trained.items()}
    for start in range(0, labels.size, rows):
        part = hidden[start : start + rows], trained, labels[start : start + rows]
        if not gradient:
            loss = loss + chunk_loss(*part)
            mx.eval(loss)
            continue
        value, (piece, more) = mx.value_and_grad(chunk_loss, argnums=(0, 1))(*part)
        loss = loss + value
        pieces.append(piece / labels.size)
        gradients = {name: gradients[name] + more[name] / labels.size for name in gradients}
        mx.eval(loss, pieces[-1], gradients)
    return loss / labels.size, mx.concatenate(pieces) if pieces else None, gradients
