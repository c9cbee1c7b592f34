"""Write an adapter as a folder that Hugging Face PEFT loads.

PEFT's matrices are transposed: `lora_A` is [rank, in] and `lora_B` [out, rank], where mlx-lm has
`lora_a` [in, rank] and `lora_b` [rank, out]; `lora_alpha` is mlx-lm's `scale` times the rank.
Tensors are written one after the other.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.adapted import AdaptedModel, open_adapted
from mlx_edgelora.export.folders import new_folder
from mlx_edgelora.export.peft_names import PROJECTIONS, Names, names_of
from mlx_edgelora.storage.files import write_atomically
from mlx_edgelora.storage.safetensors import write_tensors

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BLOCK = re.compile(r"(model\.layers)\.(\d+)\.(.+)")


@dataclass
class PeftAdapter:
    """An adapter in PEFT's terms.

    Attributes:
        tensors: unevaluated arrays by their names in the file.
        modules: names of adapted modules.
        parameters: names of adapted parameters.
        ranks: ranks of the parameters that have another rank than the rest.
    """

    tensors: dict[str, mx.array] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)


def export_peft(
    adapter: str | os.PathLike,
    save_path: str | os.PathLike,
    model: str | None = None,
    base_model: str | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write an adapter as a folder that Hugging Face PEFT loads.

    Reads the model's headers only. Needs memory for a tensor of the adapter.

    Args:
        adapter: folder of a LoRA or DoRA adapter in mlx-lm's format.
        save_path: a folder that does not exist yet.
        model: the base model, a folder or a Hub name; None for the one that the adapter names.
        base_model: the name that PEFT is to load the base model by, such as the unquantized
            original; None for `model`.
        notify: called with notes.

    Returns:
        `save_path`.

    Raises:
        EdgeLoraError: the adapter does not fit the model, PEFT has no form for one of its layers,
            or a file cannot be written; `save_path` is not created.
    """
    adapted = open_adapted(adapter, model, notify)
    theirs = to_peft(adapted)
    config = _config(adapted, theirs, base_model or adapted.name)
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    specs = {name: (array.dtype, array.shape) for name, array in theirs.tensors.items()}
    with new_folder(save_path) as folder:
        write_atomically(
            {
                folder / PEFT_WEIGHTS: lambda file: write_tensors(
                    file, specs, theirs.tensors.values(), {"format": "pt"}
                ),
                folder / PEFT_CONFIG: lambda file: file.write(text),
            }
        )
    return Path(save_path)


def to_peft(adapted: AdaptedModel) -> PeftAdapter:
    """Rename and transpose the tensors of an adapter, without reading them."""
    names = names_of(adapted.model_type)
    result = PeftAdapter()
    mixtures: dict[str, dict[str, nn.Module]] = {}
    for name, layer in adapted.layers.items():
        _refuse(adapted, name, layer)
        if isinstance(layer, LoRASwitchLinear):
            place = names.split(name)
            if place is None or place[1] not in PROJECTIONS:
                raise EdgeLoraError(f"{adapted.adapter}: PEFT has no form for the experts {name}")
            mixtures.setdefault(place[0], {})[place[1]] = layer
        else:
            _add_layer(result, names, name, layer)
    for mixture, layers in mixtures.items():
        _add_experts(result, mixture, layers)
    return result


def _refuse(adapted: AdaptedModel, name: str, layer: nn.Module) -> None:
    if isinstance(layer, DoRAEmbedding):
        raise EdgeLoraError(
            f"{adapted.adapter}: adapts {name} with DoRA, expected LoRA there: PEFT computes DoRA "
            "of an embedding differently; train without it"
        )
    if isinstance(layer, LoRAEmbedding) and "lm_head" not in adapted.lazy.model:
        raise EdgeLoraError(
            f"{adapted.adapter}: adapts {name}, which is the model's vocabulary head as well; PEFT "
            "would adapt the embedding alone; merge the adapter with mlx-edgelora fuse"
        )


def _add_layer(result: PeftAdapter, names: Names, name: str, layer: nn.Module) -> None:
    theirs = names.theirs(name)
    place = f"{PREFIX}{theirs}"
    if isinstance(layer, LoRAEmbedding):
        result.modules.append(theirs)
        result.tensors[f"{place}.lora_embedding_A"] = layer.lora_a.T
        result.tensors[f"{place}.lora_embedding_B"] = layer.lora_b.T
        return
    if names.is_parameter(theirs):
        result.parameters.append(f"{theirs}.weight")
    else:
        result.modules.append(theirs)
    result.tensors[f"{place}.lora_A.weight"] = layer.lora_a.T
    result.tensors[f"{place}.lora_B.weight"] = layer.lora_b.T
    if isinstance(layer, DoRALinear):
        result.tensors[f"{place}.lora_magnitude_vector"] = layer.m


def _add_experts(result: PeftAdapter, mixture: str, layers: dict[str, nn.Module]) -> None:
    """Add gate and up as one parameter, with their ranks side by side, and down as another.

    PEFT wraps a module once for each adapted parameter: gate and up are inside, down is outside.
    """
    places = [f"{PREFIX}{mixture}"]
    if "down_proj" in layers:
        a, b = layers["down_proj"].lora_a, layers["down_proj"].lora_b
        _add_expert_pair(result, places.pop(), a, b)
        result.parameters.append(f"{mixture}.down_proj")
        places.append(f"{PREFIX}{mixture}.base_layer")
    pair = [layers.get(name) for name in ("gate_proj", "up_proj")]
    if not any(pair):
        return
    present = next(layer for layer in pair if layer is not None)
    _, out, rank = present.lora_b.shape
    a, b, before = [], [], 0
    total = rank * sum(layer is not None for layer in pair)
    for layer in pair:
        if layer is None:
            b.append(mx.zeros((present.num_experts, out, total)))
            continue
        a.append(layer.lora_a)
        b.append(mx.pad(layer.lora_b, [(0, 0), (0, 0), (before, total - before - rank)]))
        before += rank
    parameter = f"{mixture}.gate_up_proj"
    _add_expert_pair(result, places.pop(), mx.concatenate(a, axis=1), mx.concatenate(b, axis=1))
    result.parameters.append(parameter)
    if total != rank:
        result.ranks[parameter] = total


def _add_expert_pair(result: PeftAdapter, place: str, a: mx.array, b: mx.array) -> None:
    """Flatten [experts, rank, in] and [experts, out, rank] as PEFT does: experts inside of B."""
    result.tensors[f"{place}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
    result.tensors[f"{place}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _config(adapted: AdaptedModel, theirs: PeftAdapter, base_model: str) -> dict[str, Any]:
    parameters = adapted.config["lora_parameters"]
    rank, scale = parameters["rank"], parameters["scale"]
    modules, layers = _targets(theirs.modules, len(adapted.lazy.model.layers))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(scale * rank),
        # PEFT has no dropout for adapted parameters.
        "lora_dropout": 0.0 if theirs.parameters else parameters.get("dropout", 0.0),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": adapted.config.get("fine_tune_type") == "dora",
        "use_rslora": False,
        "target_modules": modules,
        "target_parameters": theirs.parameters or None,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "modules_to_save": None,
        "rank_pattern": theirs.ranks,
        "alpha_pattern": {name: _whole(scale * r) for name, r in theirs.ranks.items()},
    }


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _targets(modules: list[str], blocks: int) -> tuple[list[str], list[int] | None]:
    """Short names of modules and the adapted blocks, where both say the same as full names."""
    found = [_BLOCK.fullmatch(name) for name in modules]
    if not all(found):
        return modules, None
    short = sorted({match[3] for match in found})
    adapted = sorted({int(match[2]) for match in found})
    # A name without a dot might also be the end of another module's name.
    if len(short) * len(adapted) != len(modules) or not all("." in name for name in short):
        return modules, None
    return short, None if len(adapted) == blocks else adapted
