"""Merge a LoRA layer a few rows at a time.

Computed at once, as mlx-lm's `fuse` does, a matrix that takes 0.1 GB in 4 bits needs over 2 GB for
a moment: the product of the LoRA matrices in float32 and in the weights' dtype, the unpacked
weights and their sum. Here the product is computed at once, so that it is the one of mlx-lm bit for
bit, and everything after it, which works row by row or group by group, for a few rows at a time.
"""

import math

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

# Largest number of elements of a matrix, or of the matrices of all experts, that are computed at
# once.
TILE = 1 << 22
# Names of the arrays that `merged_rows` returns.
MERGED_ROWS = {"weight", "scales", "biases"}


def is_large(layer: nn.Module) -> bool:
    """Whether a layer is one that `merged_rows` takes, and larger than a tile."""
    if not isinstance(layer, LoRALinear | LoRASwitchLinear):
        return False
    return math.prod(layer.lora_b.shape[:-2]) * _elements(layer) > TILE


def _elements(layer: nn.Module) -> int:
    """Elements of a layer's matrix, or of that of one expert."""
    if isinstance(layer, LoRALinear):
        return layer.lora_a.shape[0] * layer.lora_b.shape[1]
    return layer.lora_a.shape[-1] * layer.lora_b.shape[-2]


def merged_rows(layer: nn.Module, dequantize: bool) -> dict[str, mx.array]:
    """The weights of a merged layer, equal to those of its `fuse`.

    Memory: the packed matrix twice, the product in float32 (of one expert), and a tile.

    Args:
        layer: mlx-lm's LoRA layer of a linear layer [out, in] or of experts [experts, out, in].
        dequantize: unpack the weights of a quantized layer.

    Returns:
        `weight` and, if it is quantized, `scales` and perhaps `biases`, evaluated.
    """
    base, experts = layer["linear"], isinstance(layer, LoRASwitchLinear)
    packs = isinstance(base, nn.QuantizedLinear | QuantizedSwitchLinear)
    kept = {
        name: base[name] for name in ("weight", "scales", "biases") if base.get(name) is not None
    }
    parts: dict[str, list[mx.array]] = {}
    for expert in range(base.weight.shape[0]) if experts else [...]:
        delta = _product(layer, expert)
        whole = {name: array[expert] for name, array in kept.items()}
        step = max(1, TILE // delta.shape[1])
        for start in range(0, delta.shape[0], step):
            rows = {name: array[start : start + step] for name, array in whole.items()}
            weight = _unpacked(rows, base) if packs else rows["weight"]
            weight = weight + delta[start : start + step].astype(weight.dtype)
            found = [weight]
            if packs and not dequantize:
                found = mx.quantize(weight, base.group_size, base.bits, mode=base.mode)
            mx.eval(found)
            for name, array in zip(kept, found, strict=False):
                parts.setdefault(name, []).append(array)
            del rows, weight, found
        del delta, whole
    kept.clear()
    joined = {}
    for name in list(parts):
        array = mx.concatenate(parts.pop(name))
        joined[name] = (
            array.reshape(base.weight.shape[0], -1, array.shape[-1]) if experts else array
        )
        mx.eval(joined[name])
    return joined


def _product(layer: nn.Module, expert: int | object) -> mx.array:
    """The product of the LoRA matrices [out, in], computed as in mlx-lm's layers."""
    if isinstance(layer, LoRALinear):
        delta = (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    else:
        a = layer.lora_a.reshape(layer.lora_b.shape[0], -1, layer.lora_a.shape[-1])
        delta = (layer.scale * layer.lora_b[expert]) @ a[expert]
    mx.eval(delta)
    return delta


def _unpacked(rows: dict[str, mx.array], base: nn.Module) -> mx.array:
    return mx.dequantize(
        rows["weight"],
        rows["scales"],
        rows.get("biases"),
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )
