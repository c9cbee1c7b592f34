"""`value_and_grad` for any loss of any walkable model, and how gradients are arranged."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_edgelora.memory.blockwise import Arrays, BlockWalk
from mlx_edgelora.memory.stores import ActivationStore
from mlx_edgelora.model.sources import WeightSource


def value_and_grad(
    model: nn.Module,
    loss: Callable[..., Any],
    *,
    store: ActivationStore | None = None,
    weights: WeightSource | None = None,
    compiled: bool = False,
) -> Callable[..., tuple[Any, dict]]:
    """A drop-in for `nn.value_and_grad(model, loss)` whose memory does not grow with depth.

    Args:
        model: any mlx-lm model whose blocks can be walked; it is left as it was found.
        loss: calls `model` once and returns a scalar, or a tuple that begins with one.
        store, weights, compiled: see `BlockWalk`.

    Returns:
        A function of the loss's arguments that gives `(value, gradients)`, the gradients
        evaluated and arranged as `model.trainable_parameters()`.

    Raises:
        EdgeLoraError: the architecture cannot be walked.
    """
    walk = BlockWalk(model, store, weights, compiled)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict]:
        with walk.forward(lambda: loss(*args, **kwargs)) as state:

            def tail(hidden: mx.array, outside: Arrays) -> Any:
                with walk.tail(state, hidden, outside):
                    return loss(*args, **kwargs)

            value, (state.cotangent, gradients) = mx.value_and_grad(tail, argnums=(0, 1))(
                state.hidden, walk.outside()
            )
            state.hidden = None
            mx.eval(value, state.cotangent, gradients)
            for more in walk.backward(state):
                add_into(gradients, more)
        return value, gradient_tree(model, gradients)

    return run


def add_into(gradients: Arrays, more: Arrays) -> None:
    """Add gradients by name in place; a tied head and embedding contribute to one name."""
    for name, value in more.items():
        gradients[name] = gradients[name] + value if name in gradients else value


def gradient_tree(model: nn.Module, gradients: Mapping[str, mx.array]) -> dict:
    """Arrange gradients by name as `nn.value_and_grad` returns them."""
    return tree_map_with_path(lambda name, _: gradients[name], model.trainable_parameters())
