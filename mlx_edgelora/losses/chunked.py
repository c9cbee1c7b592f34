"""Cross-entropy over chunks of tokens with all their logits, for a head that has no rows to read.

That is one whose logits depend on each other, whose adapter drops out inputs, or behind
which something else is trained. `losses/exact.py` needs much less where it can be used.
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
        trained: parameters of the projection that get a gradient, by name.
        rows: tokens per chunk.
        gradient: compute gradients too.
        label_smoothing: as in `CrossEntropy`.
        evaluate: called with what must exist before the next chunk; evaluates it, where it can.

    Returns:
        The loss, float32 []; its gradient [n, hidden] or None; those of `trained`.

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
    """A loss that gives its own gradients, as a part of a graph.

    Args:
        value_and_grad: hidden states and trained parameters -> the loss and both gradients, lazy.
        hidden: [n, hidden].
        trained: by name.
    """

    @mx.custom_function
    def loss(hidden: mx.array, *values: mx.array) -> list[mx.array]:
        value, gradient, more = value_and_grad(hidden, dict(zip(trained, values, strict=True)))
        return [value, gradient, *(more[name] for name in trained)]

    @loss.vjp
    def backward(_: object, cotangents: list[mx.array], outputs: list[mx.array]) -> list:
        return [cotangents[0].astype(gradient.dtype) * gradient for gradient in outputs[1:]]

    return loss(hidden, *trained.values())[0]
