"""`value_and_grad` for any loss of a model that can be walked block by block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_edgelora.blocks.block_list import array_slots, bind_arrays
from mlx_edgelora.blocks.tracing import gradient_hook
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.stores import ActivationStore


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
        model: an mlx-lm model whose blocks can be walked; it is not changed.
        loss: calls `model` once and returns a scalar, or a tuple whose first item is a scalar.
        store: keeps the inputs of blocks until the backward; by default in memory, which grows
            with depth.
        weights: source of frozen weights; by default they are in the model.
        compiled: whether to compile one function for each kind of block, as in `Walk`.

    Returns:
        A function of the loss's arguments that gives `(value, gradients)`, the gradients
        evaluated and arranged as `model.trainable_parameters()`.

    Raises:
        EdgeLoraError: the architecture cannot be walked, or the loss uses trained parameters of
            blocks outside of its one call of the model.
    """
    walk = Walk(model, store, weights, compiled)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict]:
        walk.refresh()
        with walk.forward(lambda: loss(*args, **kwargs)) as state:
            reached: set[str] = set()

            def tail(hidden: mx.array, outside: Arrays, zero: mx.array) -> Any:
                once = _called_once(walk, hidden, zero, reached)
                with walk.tail(state, hidden, outside), once:
                    return loss(*args, **kwargs)

            value, (state.cotangent, gradients, _) = mx.value_and_grad(tail, argnums=(0, 1, 2))(
                state.hidden, walk.outside(), mx.zeros(())
            )
            if reached:
                raise EdgeLoraError(
                    f"value_and_grad: the loss depends on {min(reached)} other than through what "
                    "the model returns, which the gradient would miss; use mlx.nn.value_and_grad"
                )
            state.hidden = None
            mx.eval(value, state.cotangent, gradients)
            for more in walk.backward(state):
                add_into(gradients, more)
        return value, gradient_tree(model, gradients)

    return run


@contextmanager
def _called_once(walk: Walk, hidden: mx.array, zero: mx.array, reached: set[str]) -> Iterator[None]:
    """Let the last block return `hidden` once, and collect other dependencies of the loss.

    Adding `zero`, which is differentiated, to an array shows in `reached` whether the loss depends
    on that array.
    """
    last, calls = len(walk.blocks) - 1, set()

    def watch(name: str, value: mx.array) -> mx.array:
        return gradient_hook(lambda: reached.add(name))(value + zero.astype(value.dtype))

    def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        if index in calls:
            raise EdgeLoraError(
                "value_and_grad: the loss calls the model or a block of it a second time, expected "
                "one call of the model; put all rows into one batch"
            )
        calls.add(index)
        if index == last:
            return hidden
        return watch(f"the output of block {index}", x)

    trained = {
        name: watch(name, value)
        for name, value in tree_flatten(walk.model.trainable_parameters())
        if walk.blocks.local(name)
    }
    with bind_arrays(array_slots(walk.model), trained), walk.blocks.intercept(handler):
        yield


def add_into(gradients: Arrays, more: Arrays) -> None:
    """Add gradients by name, in place; a tied head and embedding share one name."""
    for name, value in more.items():
        gradients[name] = gradients[name] + value if name in gradients else value


def gradient_tree(model: nn.Module, gradients: Mapping[str, mx.array]) -> dict:
    """Arrange gradients by name as `nn.value_and_grad` returns them."""
    return tree_map_with_path(lambda name, _: gradients[name], model.trainable_parameters())
