"""Cross-entropy over chunks of tokens with all their logits, for heads that cannot be tiled.

A head cannot be tiled by rows if its logits depend on each other, if its adapter has dropout, or
if other trained parameters follow it. `losses/exact.py` needs much less memory for other heads.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.losses.exact import Objective

Arrays = dict[str, mx.array]
# Hidden states [m, hidden] and trained parameters -> logits [m, vocabulary].
Project = Callable[[mx.array, Arrays], mx.array]


def chunked_cross_entropy(
    hidden: mx.array,
    labels: mx.array,
    project: Project,
    trained: Arrays,
    rows: int,
    gradient: bool = True,
    label_smoothing: float = 0.0,
    evaluate: Callable[..., None] = mx.eval,
    objective: Objective | None = None,
) -> tuple[mx.array | tuple[mx.array, mx.array], mx.array | None, Arrays]:
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
        objective: computes another loss from the losses of the tokens, which are then computed
            twice; only with `gradient`.

    Returns:
        The loss, float32 [], or what the objective returns; its gradient by `hidden`, [n, hidden],
        or None; and the gradients of `trained` by name.

    Memory: about four arrays of rows x vocabulary, and the gradients.
    """
    value, weights = None, None
    if objective is not None:
        losses = token_losses(hidden, labels, project, trained, rows, evaluate)
        value, weights = mx.value_and_grad(objective)(losses)
        evaluate(value, weights)

    def chunk_loss(
        hidden: mx.array, trained: Arrays, labels: mx.array, weights: mx.array | None
    ) -> mx.array:
        losses = _losses(project(hidden, trained), labels, label_smoothing)
        return losses.sum() if weights is None else (losses * weights).sum()

    size = labels.size if weights is None else 1
    loss = mx.array(0.0)
    pieces: list[mx.array] = []
    gradients = {name: mx.zeros(value.shape, value.dtype) for name, value in trained.items()}
    for start in range(0, labels.size, rows):
        some, _ = mx.depends([hidden[start : start + rows], labels], [loss])
        own = None if weights is None else weights[start : start + rows]
        part = some, trained, labels[start : start + rows], own
        if not gradient:
            loss = loss + chunk_loss(*part)
            evaluate(loss)
            continue
        term, (piece, more) = mx.value_and_grad(chunk_loss, argnums=(0, 1))(*part)
        loss = loss + term
        pieces.append(piece / size)
        gradients = {name: gradients[name] + more[name] / size for name in gradients}
        evaluate(loss, pieces[-1], gradients)
    result = loss / size if value is None else value
    return result, mx.concatenate(pieces) if pieces else None, gradients


def token_losses(
    hidden: mx.array,
    labels: mx.array,
    project: Project,
    trained: Arrays,
    rows: int,
    evaluate: Callable[..., None] = mx.eval,
) -> mx.array:
    """Cross-entropy of each token, float32 [n]; see `chunked_cross_entropy`."""
    found: list[mx.array] = []
    for start in range(0, labels.size, rows):
        some, _ = mx.depends([hidden[start : start + rows], labels], found[-1:] or [labels])
        found.append(_losses(project(some, trained), labels[start : start + rows]))
        evaluate(found[-1])
    return mx.concatenate(found)


def _losses(logits: mx.array, labels: mx.array, label_smoothing: float = 0.0) -> mx.array:
    return nn.losses.cross_entropy(
        logits.astype(mx.float32), labels, label_smoothing=label_smoothing
    )


def in_graph(
    value_and_grad: Callable[[mx.array, Arrays], tuple[mx.array | tuple, mx.array, Arrays]],
    hidden: mx.array,
    trained: Arrays,
    has_figures: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """Make a loss that computes its own gradients part of a graph.

    Args:
        value_and_grad: hidden states and trained parameters -> the loss and both gradients, lazy.
        hidden: [n, hidden].
        trained: trained parameters by name.
        has_figures: whether it gives a pair of the loss and figures in place of the loss.

    Returns:
        The loss, float32 [], or the pair.
    """
    count = 2 if has_figures else 1

    @mx.custom_function
    def loss(hidden: mx.array, *values: mx.array) -> list[mx.array]:
        value, gradient, more = value_and_grad(hidden, dict(zip(trained, values, strict=True)))
        values = value if has_figures else [value]
        return [*values, gradient, *(more[name] for name in trained)]

    @loss.vjp
    def backward(_: object, cotangents: list[mx.array], outputs: list[mx.array]) -> list:
        return [cotangents[0].astype(gradient.dtype) * gradient for gradient in outputs[count:]]

    found = loss(hidden, *trained.values())
    return tuple(found[:count]) if has_figures else found[0]
