"""Check the sizes in a model's config.json against its shards, before mlx-lm builds the model.

Building takes time and memory by those sizes, and MLX ends the whole process if some of them are
zero or negative (a division in C++), which no `except` can catch.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.errors import EdgeLoraError, shown

# Sizes that every model has at least one of; others may be 0 where a model has no such part.
_POSITIVE = re.compile(
    r"hidden_size|vocab_size|head_dim|d_model|dim|n_embd|n_heads?"
    r"|(num|n)_(attention_|key_value_|query_|kv_|q_|hidden_)?(heads|layers)|n_layer"
)
_BLOCKS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
# Python builds one object for each of these; the largest models have some hundreds.
_PARTS = re.compile(r"(num|n)_.*(layers?|heads?|experts?|blocks?|groups?|codebooks?|loops?)")
_SIZES = re.compile(r".*_(size|dim|rank|len|length|width)|(num|n)_.*")
MOST_PARTS, MOST_SIZE = 2**16, 2**31 - 1
# What MLX can pack, by the mode: group sizes and bits.
_PACKINGS = {
    "affine": ((16, 32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def check_config(path: Path, config: Mapping[str, Any], names: Mapping[str, object]) -> None:
    """Refuse a configuration that cannot be that of the tensors in the shards.

    Args:
        path: of config.json, for messages.
        config: its content.
        names: of all tensors.

    Raises:
        EdgeLoraError: a size is not a whole number in its range, there are more blocks than the
            shards hold, or MLX has no such quantization.
    """
    # The first number in a name is that of a block.
    numbers = [int(m[1]) for name in names if (m := re.search(r"\.(\d{1,9})\.", f".{name}."))]
    held = 1 + max(numbers, default=-1)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key, value in _sizes(part):
            _check_size(path, key, value)
            # Twice as many: some architectures use blocks twice. mlx-lm compares exactly.
            if key in _BLOCKS and value is not None and value > 2 * held:
                raise EdgeLoraError(
                    f"{path}: {key} is {value}, but the shards hold {held} blocks; download the "
                    "model again"
                )
        _check_quantization(path, part.get("quantization"))


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if _POSITIVE.fullmatch(key) or _PARTS.fullmatch(key) or _SIZES.fullmatch(key):
            for number in value if isinstance(value, list) else [value]:
                yield key, number


def _check_size(path: Path, key: str, value: Any) -> None:
    needed = _POSITIVE.fullmatch(key)
    most = MOST_PARTS if _PARTS.fullmatch(key) else MOST_SIZE
    if value is None or (not needed and not isinstance(value, int | float)):
        return
    least = 1 if needed else -1  # -1 is often none
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not needed and isinstance(value, bool | float) and abs(value) <= most:
        return
    if not whole or not least <= value <= most:
        raise EdgeLoraError(
            f"{path}: {key} is {shown(value)}, expected a whole number from {least} to {most}; "
            "download the model again"
        )


def _check_quantization(path: Path, quantization: Any) -> None:
    if quantization is None:
        return
    layers = quantization.items() if isinstance(quantization, dict) else ()
    for place in (quantization, *(entry for _, entry in layers if isinstance(entry, dict))):
        if not isinstance(place, dict) or not _is_packing(place):
            raise EdgeLoraError(
                f"{path}: has a quantization of {shown(place)}, expected a group_size of 16, 32, "
                "64 or 128 and bits of 2, 3, 4, 5, 6 or 8 that fit the mode; download the model "
                "again"
            )


def _is_packing(settings: Mapping[str, Any]) -> bool:
    mode = settings.get("mode", "affine")
    groups, bits = _PACKINGS.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
    sizes = settings.get("group_size"), settings.get("bits")
    return all(type(size) is int for size in sizes) and sizes[0] in groups and sizes[1] in bits


def checked_sanitize(
    model: nn.Module, sanitize: Callable[[dict[str, mx.array]], dict[str, mx.array]]
) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
    """Wrap a model's `sanitize`, after which mlx-lm packs layers as their weights are packed.

    Raises (when called):
        ValueError: packed weights do not fit the layer, which would end the process.
    """

    def sanitize_and_check(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = sanitize(weights)
        for name, module in model.named_modules():
            packed, scales = weights.get(f"{name}.weight"), weights.get(f"{name}.scales")
            if scales is None or packed is None or not hasattr(module, "to_quantized"):
                continue
            columns, groups = module.weight.shape[-1], scales.shape[-1] if scales.ndim else 0
            bits = packed.shape[-1] * 32 / columns if packed.ndim and columns else 0
            fits = groups and columns % groups == 0 and bits in (2, 3, 4, 5, 6, 8)
            if not fits or columns // groups not in (16, 32, 64, 128):
                raise ValueError(
                    f"{name} has {columns} inputs, but packed weights of shape {packed.shape} with "
                    f"scales of shape {scales.shape}"
                )
        return weights

    return sanitize_and_check
