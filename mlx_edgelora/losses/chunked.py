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
