"""Optimizers of mlx-lm, applied one block of the model at a time.

The update of all adapters is built lazily and evaluated block by block, so only one
block's intermediate arrays are alive at once, and a gradient's buffer is free for
reuse as soon as its block is done. The arithmetic, and so every bit of the result, is
that of `optimizer.update(model, gradients)`.
"""

from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten
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


def scaled(
    gradients: dict[str, mx.array], count: int, factor: mx.array | None = None
) -> dict[str, mx.array]:
    """Gradients by name divided by `count`, times `factor`, not yet evaluated; empties them."""
    result = {}
    for name in list(gradients):
        gradient = gradients.pop(name)
        if count > 1:
            gradient = gradient / count
        if factor is not None:
            gradient = (gradient * factor).astype(gradient.dtype)
        result[name] = gradient
    return result


def squares(gradients: Mapping[str, mx.array], count: int) -> dict[str, mx.array]:
    """Sum of squares of each gradient divided by `count`: float32 scalars, evaluated."""
    result = {}
    for name, gradient in gradients.items():
        mean = gradient / count if count > 1 else gradient
        result[name] = mean.astype(mx.float32).square().sum()
    _evaluate_by_block(result)
    return result


def global_norm(squares: Mapping[str, mx.array], order: Iterable[str]) -> mx.array:
    """Root of the sum in this order, as in `mlx.optimizers.clip_grad_norm`; evaluated."""
    total = mx.array(0.0)
    for name in order:
        total = total + squares[name]
    norm = mx.sqrt(total)
    mx.eval(norm)
    return norm


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """What gradients of this norm are multiplied by so that it is `max_norm` at most."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0)


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
