"""What DoRA adds to a model's preparation: which layers it can adapt, and where `m` starts."""

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.dora import row_norms
from mlx_edgelora.model.checkpoint import LazyModel

# What mlx-lm adapts if no layers are named, and what has a method of its own for it.
KINDS = (
    nn.Linear,
    nn.QuantizedLinear,
    SwitchLinear,
    QuantizedSwitchLinear,
    nn.Embedding,
    nn.QuantizedEmbedding,
)


def check_dora(model: nn.Module, count: int, keys: Sequence[str] | None) -> None:
    """Check that mlx-lm's DoRA layers can adapt all layers that an adapter names.

    Args:
        model: a model without adapters.
        count: number of last blocks.
        keys: names of layers, as in `add_lora`.

    Raises:
        EdgeLoraError: names the first layer that they cannot adapt, and the reason.
    """
    for name, layer in _adapted(model, count, keys):
        if reason := _refusal(layer):
            raise EdgeLoraError(
                f"fine_tune_type: dora cannot adapt {name} ({type(layer).__name__}): {reason}; "
                "name other layers in lora_parameters.keys, or use fine_tune_type lora"
            )


def _adapted(
    model: nn.Module, count: int, keys: Sequence[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """The layers that mlx-lm adapts, with their full names."""
    blocks = {id(block) for block in model.layers[len(model.layers) - count :]}
    whole = list(model.named_modules())
    for path, block in reversed(whole):
        if id(block) not in blocks:
            continue
        for name, layer in block.named_modules():
            if name in keys if keys is not None else _is_default(layer):
                yield f"{path}.{name}", layer
    for name, layer in whole:
        if keys is not None and name in keys:
            yield name, layer


def _is_default(layer: nn.Module) -> bool:
    return hasattr(layer, "to_lora") or isinstance(layer, KINDS)


def _refusal(layer: nn.Module) -> str | None:
    """Why mlx-lm has no DoRA for a layer; None if it has."""
    if isinstance(layer, nn.QuantizedLinear):
        if 32 % layer.bits:
            return f"mlx-lm's DoRA takes no matrix of {layer.bits} bits"
        return None
    if isinstance(layer, nn.QuantizedEmbedding):
        return "mlx-lm's DoRA takes no quantized embedding"
    if isinstance(layer, nn.Linear | nn.Embedding):
        return None
    return "mlx-lm has no DoRA for this kind of layer"


def renew_magnitudes(lazy: LazyModel) -> None:
    """Let every `m` be computed from arrays of its own, so that the model's are not read with it.

    An evaluated array stays in memory as long as something holds it, and the model holds its
    own: with these, a matrix is dropped as soon as its norms are known. Nothing is read here.

    Args:
        lazy: a model with adapters; arrays that are not stored as they are used stay the model's.
    """
    shards: dict[Path, dict[str, mx.array]] = {}
    for module in lazy.model.modules():
        if not isinstance(module, DoRALinear):
            continue
        linear = copy(module.linear)
        for name, array in linear.items():
            if isinstance(array, mx.array):
                linear[name] = _again(lazy, array, shards)
        module.m = row_norms(linear)


def _again(lazy: LazyModel, array: mx.array, shards: dict[Path, dict[str, mx.array]]) -> mx.array:
    """The stored tensor as another lazy array."""
    place = lazy.location(array)
    if place is None:
        return array
    if place.name not in shards.get(place.shard, {}):
        shards[place.shard] = mx.load(str(place.shard))
    return shards[place.shard].pop(place.name)
