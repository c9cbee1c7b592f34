"""Cross-entropy over chunks of tokens with all their logits, for heads that cannot be tiled.

A head cannot be tiled by rows if its logits depend on each other, if its adapter has dropout, or
if other trained parameters follow it. `losses/exact.py` needs much less memory for other heads.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

Arrays = dict[str, mx.array]


def chunked_cross_entropy(
    hidden: mx.array,
    labels: mx.array,
    project: Callable[[mx.array, Arrays], mx.array],
    trained: Arrays,
    rows: int,
    gradient: bool = True,
    label_smoothing: float = 0.0,
    evaluate: Callable[..., None] = mx.eval,
) -> tuple[mx.array, mx.array | None, Arrays]:
    """Mean cross-entropy over chunks of tokens, with gradients of the head's own parameters.

    Args:
        hidden: [n, hidden], evaluated.
        labels: int [n].
        project: hidden states [m, hidden] and trained parameters -> logits [m, vocabulary].
        trained: trained parameters of the projection, by name.
        rows: tokens per chunk.
        gradient: whether to compute gradients.
        label_smoothing: as in `CrossEntropy`.
        evaluate: called with the arrays that must be evaluated before the next chunk.

    Returns:
        The loss, float32 []; its gradient by `hidden`, [n, hidden], or None; and the gradients of
        `trained` by name.

    Memory: about four arrays of rows x vocabulary, and the gradients.
    """

    def chunk_loss(hidden: mx.array, trained: Arrays, labels: mx.array) -> mx.array:
        logits = project(hidden, trained).astype(mx.float32)
        return nn.losses.cross_entropy(
            logits, labels, label_smoothing=label_smoothing, reduction="sum"
        )

    loss = mx.array(0.0)
    pieces: list[mx.array] = []
    gradients = {name: mx.zeros(value.shape, value.dtype) for name, value in trained.items()}
    for start in range(0, labels.size, rows):
        some, _ = mx.depends([hidden[start : start + rows], labels], [loss])
        part = some, trained, labels[start : start + rows]
        if not gradient:
            loss = loss + chunk_loss(*part)
            evaluate(loss)
            continue
        value, (piece, more) = mx.value_and_grad(chunk_loss, argnums=(0, 1))(*part)
        loss = loss + value
        pieces.append(piece / labels.size)
        gradients = {name: gradients[name] + more[name] / labels.size for name in gradients}
        evaluate(loss, pieces[-1], gradients)
    return loss / labels.size, mx.concatenate(pieces) if pieces else None, gradients


def in_graph(
    value_and_grad: Callable[[mx.array, Arrays], tuple[mx.array, mx.array, Arrays]],
    hidden: mx.array,
    trained: Arrays,
) -> mx.array:
    """Make a loss that computes its own gradients part of a graph.

    Args:
        value_and_grad: hidden states and trained parameters -> the loss and both gradients, lazy.
        hidden: [n, hidden].
        trained: trained parameters by name.

    Returns:
        The loss, float32 [].
    """

    @mx.custom_function
    def loss(hidden: mx.array, *values: mx.array) -> list[mx.array]:
        value, gradient, more = value_and_grad(hidden, dict(zip(trained, values, strict=True)))
        return [value, gradient, *(more[name] for name in trained)]

    @loss.vjp
    def backward(_: object, cotangents: list[mx.array], outputs: list[mx.array]) -> list:
        return [cotangents[0].astype(gradient.dtype) * gradient for gradient in outputs[1:]]

    return loss(hidden, *trained.values())[0]
