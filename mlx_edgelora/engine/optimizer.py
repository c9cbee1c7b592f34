"""Optimizers of mlx-lm, applied one block of the model at a time.

Only one block's intermediate arrays are alive at once, and a gradient's buffer can be reused as
soon as its block is updated. The arithmetic is that of `optimizer.update(model, gradients)`; if it
is compiled, as in mlx-lm, MLX may round the last bit of a fused operation differently.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import isfinite

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx_lm.tuner.utils import build_schedule

from mlx_edgelora.config import OPTIMIZERS, TrainConfig
from mlx_edgelora.errors import EdgeLoraError, shortened, shown

# What MLX raises for arguments that it cannot use; std::bad_cast is a RuntimeError.
_REJECTIONS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_optimizer(config: TrainConfig) -> optimizers.Optimizer:
    """The optimizer that `optimizer`, `optimizer_config`, `learning_rate`, `lr_schedule` name.

    As in mlx-lm a schedule, counted in optimizer updates, takes the place of the rate. The option
    `loraplus_lr_ratio` becomes an attribute of the optimizer, for `BlockUpdate`.

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
        # One step with a trial optimizer, because some arguments are only checked there.
        trial = OPTIMIZERS[name](learning_rate=rate, **arguments)
        mx.eval(trial.apply_gradients({"x": mx.ones((2, 2))}, {"x": mx.ones((2, 2))}))
        optimizer = OPTIMIZERS[name](learning_rate=rate, **arguments)
    except _REJECTIONS as error:
        raise EdgeLoraError(
            f"optimizer_config.{name}: got {arguments}, which {OPTIMIZERS[name].__name__} rejects "
            f"({shortened(str(error), 200)}); see its arguments in mlx.optimizers"
        ) from error
    optimizer.loraplus_lr_ratio = config.loraplus_lr_ratio
    return optimizer


def _build_schedule(lr_schedule: dict) -> Callable[[mx.array], mx.array]:
    try:
        schedule = build_schedule(lr_schedule)
        rate = schedule(mx.array(0, mx.uint64))
        mx.eval(rate)
        if not isfinite(rate.item()):
            raise ValueError(f"its first rate is {rate.item()}")
    except _REJECTIONS as error:
        raise EdgeLoraError(
            f"lr_schedule: got {shown(lr_schedule)}, which cannot be built "
            f"({shortened(str(error), 200)}); expected name, the "
            "list arguments of that function in mlx.optimizers.schedulers, and optionally warmup"
        ) from error
    return schedule


class BlockUpdate:
    """Applies an optimizer to one block at a time; one compiled function serves similar blocks.

    With LoRA+ (arXiv 2402.12354) the learning rate of every B is a multiple of that of A; as in
    PEFT, vectors (DoRA's `m`) have the rate of B.

    Args:
        optimizer: a new optimizer; its attribute `loraplus_lr_ratio`, if any, is that multiple.
        compiled: whether to compile the arithmetic.
    """

    def __init__(self, optimizer: optimizers.Optimizer, compiled: bool) -> None:
        self._optimizer = optimizer
        self._ratio = getattr(optimizer, "loraplus_lr_ratio", None)
        self._function = mx.compile(self._apply) if compiled else self._apply

    def begin(self) -> None:
        """Count a step and advance the schedules, once for all blocks."""
        self._optimizer.apply_gradients({}, {})

    def apply(
        self,
        gradients: Mapping[str, mx.array],
        parameters: Mapping[str, mx.array],
        states: Mapping[str, dict],
        factor: mx.array | None,
    ) -> tuple[dict[str, mx.array], dict[str, dict]]:
        """New parameters and optimizer states by name, lazy.

        Args:
            gradients: gradients by parameter name.
            parameters: includes these parameters; others are ignored.
            states: optimizer state of each parameter; empty before the first update.
            factor: scalar that multiplies the gradients; None for 1.
        """
        names = list(gradients)
        ready: dict[str, dict] = {}
        for name in names:
            ready[name] = dict(states.get(name) or {})
            if not ready[name]:
                self._optimizer.init_single(parameters[name], ready[name])
        scalars = {k: v for k, v in self._optimizer.state.items() if isinstance(v, mx.array)}
        wanted = {name: parameters[name] for name in names}
        return self._function(dict(gradients), wanted, ready, scalars, factor)

    def _apply(
        self,
        gradients: dict[str, mx.array],
        parameters: dict[str, mx.array],
        states: dict[str, dict],
        scalars: dict[str, mx.array],
        factor: mx.array | None,
    ) -> tuple[dict[str, mx.array], dict[str, dict]]:
        # The step count and scheduled values are arguments, or they would be compiled as constants.
        state = self._optimizer.state
        before = {name: state[name] for name in scalars}
        state.update(scalars)
        try:
            updated, after = {}, {}
            for name, gradient in gradients.items():
                clipped = gradient
                if factor is not None:
                    clipped = (gradient * factor).astype(gradient.dtype)
                after[name] = dict(states[name])
                if self._ratio is not None:
                    is_b = name.endswith("lora_b") or gradient.ndim == 1
                    rate = scalars["learning_rate"]
                    state["learning_rate"] = self._ratio * rate if is_b else rate
                updated[name] = self._optimizer.apply_single(clipped, parameters[name], after[name])
        finally:
            state.update(before)
        return updated, after


def average(gradients: dict[str, mx.array], count: float) -> dict[str, mx.array]:
    """Gradients by name divided by `count`, not yet evaluated; empties them."""
    result = {}
    for name in list(gradients):
        gradient = gradients.pop(name)
        result[name] = gradient / count if count > 1 else gradient
    return result


def squares(gradients: Mapping[str, mx.array], count: float) -> dict[str, mx.array]:
    """Sum of squares of each gradient divided by `count`: float32 scalars, evaluated."""
    result = {}
    for name, gradient in gradients.items():
        mean = gradient / count if count > 1 else gradient
        # The layout of an array decides the order of summation; arrays from a file are contiguous.
        result[name] = mx.contiguous(mean.astype(mx.float32).square()).sum()
    mx.eval(result)
    return result


def global_norm(squares: Mapping[str, mx.array], order: Iterable[str]) -> mx.array:
    """Square root of the sum in this order, as in `mlx.optimizers.clip_grad_norm`; evaluated."""
    total = mx.array(0.0)
    for name in order:
        total = total + squares[name]
    norm = mx.sqrt(total)
    mx.eval(norm)
    return norm


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """Factor that scales gradients of this norm down to `max_norm`, at most 1."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0)


def group_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of parameters, grouped by the prefix of their block."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block_name(name), []).append(name)
    return blocks


@cache
def _block_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.lora_a` -> `model.layers.3`; a name without index -> ``."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return ""
