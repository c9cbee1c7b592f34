"""Whether a module trains weights of the model, and not adapters alone."""

import mlx.nn as nn
from mlx.utils import tree_flatten

# The names of the arrays of mlx-lm's LoRA and DoRA layers.
ADAPTERS = ("lora_a", "lora_b", "m")


def trains_weights(module: nn.Module) -> bool:
    """Whether a module has trained arrays that are no adapters.

    Slices of an MLP and groups of experts have gradients of their own, which leave the matrices
    out; such a module is differentiated by MLX instead.
    """
    trained = tree_flatten(module.trainable_parameters())
    return any(not is_adapter(name) for name, _ in trained)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an array of a LoRA or DoRA layer."""
    return name.rpartition(".")[2] in ADAPTERS
