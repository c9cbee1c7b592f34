"""Optimizers of mlx-lm, applied one block of the model at a time.

The update of all adapters is built lazily and evaluated block by block, so only one
block's intermediate arrays are alive at once, and a gradient's buffer is free for
reuse as soon as its block is done. The arithmetic, and so every bit of the result, is
that of `optimizer.update(model, gradients)`.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import build_schedule

from mlx_edgelora.config import OPTIMIZERS, TrainConfig
from mlx_edgelora.errors import EdgeLoraError


def build_optimizer(config: TrainConfig) -> optimizers.Optimizer:
    """The optimizer that `optimizer`, `optimizer_config`, `learning_rate`, `lr_schedule` name.

    As in mlx-lm a schedule, counted in optimizer updates, takes the place of the rate.

    Raises:
        EdgeLoraError: an unknown optimizer, or arguments that it or the schedule refuses.
    """
    name = config.optimizer.lower()
    if name not in OPTIMIZERS:
        raise EdgeLoraError(
            f"optimizer: got {config.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}"
        )
    rate = config.learning_rate
    if config.lr_schedule:
        rate = _build_schedule(config.lr_schedule)
    arguments = dict(config.optimizer_config.get(name) or {})
    try:
        # A step of a trial one: some arguments are only looked at there.
        trial = OPTIMIZERS[name](learning_rate=rate, **arguments)
        mx.eval(trial.apply_gradients({"x": mx.ones((2, 2))}, {"x": mx.ones((2, 2))}))
        return OPTIMIZERS[name](learning_rate=rate, **arguments)
    except (IndexError, TypeError, ValueError) as error:
        raise EdgeLoraError(
            f"optimizer_config.{name}: got {arguments}, which {OPTIMIZERS[name].__name__} refuses "
            f"({error}); see its arguments in mlx.optimizers"
        ) from error


def _build_schedule(lr_schedule: dict) -> Callable[[mx.array], mx.array]:
    try:
        schedule = build_schedule(lr_schedule)
        rate = schedule(mx.array(0, mx.uint64))
        mx.eval(rate)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise EdgeLoraError(
            f"lr_schedule: got {lr_schedule}, which cannot be built ({error}); expected name, the "
            "list arguments of that function in mlx.optimizers.schedulers, and optionally warmup"
        ) from error
    return schedule


def update(model: nn.Module, optimizer: optimizers.Optimizer, gradients: dict) -> None:
    """Apply `gradients` to the model and evaluate its parameters and the optimizer's state.

    Args:
        model: its trainable parameters are replaced.
        optimizer: initialised on the first call.
        gradients: the tree of `nn.value_and_grad`; emptied, so that its buffers can be
            reused. The caller must hold no other reference to its arrays.
    """
    optimizer.update(model, gradients)
    gradients.clear()
    _evaluate_by_block(model.trainable_parameters(), optimizer.state)


def accumulate(total: dict | None, gradients: dict) -> dict:
    """The evaluated sum of two gradient trees; both are emptied. `None` counts as zero."""
    if total is None:
        return gradients
    result = tree_map(mx.add, gradients, total)
    total.clear()
    gradients.clear()
    _evaluate_by_block(result)
    return result


def divide(gradients: dict, count: int) -> dict:
    """The tree divided by `count`, not yet evaluated, so that `update` does it by blocks."""
    result = tree_map(lambda gradient: gradient / count, gradients)
    gradients.clear()
    return result


def _evaluate_by_block(*trees: dict) -> None:
    blocks: dict[str, list[mx.array]] = {}
    for tree in trees:
        for name, array in tree_flatten(tree):
            blocks.setdefault(_block_name(name), []).append(array)
    for arrays in blocks.values():
        mx.eval(arrays)


def _block_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.lora_a` -> `model.layers.3`; a name without index -> ``."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return ""
