"""Turn an adapter of Hugging Face PEFT into one of mlx-lm, to generate with it or to train on.

mlx-lm has one rank and one scale for all layers. Adapters of a smaller rank get columns of A as a
new adapter has them and rows of B of zeros; another scale is multiplied into B. Neither changes
what the adapter computes.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.adapted import LAYERS
from mlx_edgelora.export.folders import new_folder
from mlx_edgelora.export.peft import PEFT_CONFIG, PEFT_WEIGHTS
from mlx_edgelora.export.peft_files import Pair, PeftFolder, expected_places, read_peft
from mlx_edgelora.export.peft_names import Names, names_of
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import explain_misfit
from mlx_edgelora.training.adapters import save_adapters
from mlx_edgelora.training.text import abbreviate

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_EMBEDDINGS = nn.Embedding, nn.QuantizedEmbedding
_ADAPTABLE = (nn.Linear, nn.QuantizedLinear, *_EMBEDDINGS)
_SWITCHES = SwitchLinear, QuantizedSwitchLinear


def import_peft(
    peft: str | os.PathLike,
    save_path: str | os.PathLike,
    model: str | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write a PEFT adapter as an adapter of mlx-lm, in float32.

    Needs memory for a few tensors of the adapter.

    Args:
        peft: the folder with PEFT's `adapter_config.json` and `adapter_model.safetensors`.
        save_path: a folder that does not exist yet.
        model: the base model for mlx-lm, a folder or a Hub name; None for the one that PEFT's
            configuration names.
        notify: called with notes.

    Returns:
        `save_path`.

    Raises:
        EdgeLoraError: the folder is not that of a LoRA adapter of this model, mlx-lm has no form
            for it, or a file cannot be written; `save_path` is not created.
    """
    folder = read_peft(Path(peft))
    name = model or folder.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise EdgeLoraError(
            f"{folder.path / PEFT_CONFIG}: names no base model; give one with --model"
        )
    lazy = open_model(name, streamed=False, quantize=None, cache=Path())
    pairs = _pairs(folder, lazy, names_of(lazy.config["model_type"]))
    config = {"model": name} | _settings(folder, pairs, len(lazy.model.layers))
    scale = config["lora_parameters"]["scale"]
    if any(pair.scale != scale for pair in pairs.values()):
        notify(f"note: scales differ between layers; those other than {scale:g} went into lora_b")
    dora = config["fine_tune_type"] == "dora"
    with explain_misfit(folder.path, lazy.source):
        linear_to_lora_layers(
            lazy.model, config["num_layers"], config["lora_parameters"], use_dora=dora
        )
    weights = _weights(folder, lazy.model, pairs, scale)
    with new_folder(save_path) as building:
        save_adapters(building, weights, config)
    return Path(save_path)


def _pairs(folder: PeftFolder, lazy: LazyModel, names: Names) -> dict[str, Pair]:
    """The matrices by mlx-lm's names of the adapted layers, all of which the model has."""
    modules = dict(lazy.model.named_modules())
    linear = [n for n, m in modules.items() if isinstance(m, _ADAPTABLE)]
    expected = expected_places(folder.config, map(names.theirs, linear))
    if missing := sorted(set(expected) - set(map(names.theirs, folder.tensors))):
        raise EdgeLoraError(
            f"{folder.path / PEFT_WEIGHTS}: lacks {abbreviate(missing)}, which {PEFT_CONFIG} asks "
            "for; name the model that it was trained on with --model, or write the adapter again"
        )
    for place, copy in folder.copies.items():
        if place not in modules or modules[place].weight.shape[0] != copy.shape[0]:
            raise EdgeLoraError(
                f"{folder.path}: has a matrix {place} of {copy.shape[0]} rows, expected those of "
                f"{lazy.source}; merge the adapter with PEFT and convert the model instead"
            )
    result: dict[str, Pair] = {}
    experts: dict[str, dict[int, str]] = {}
    for place in folder.tensors:
        mixture = place.removesuffix(".base_layer")
        if match := _EXPERT.fullmatch(place):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = place
        elif names.experts is not None and mixture.endswith(".experts"):
            result |= _mixture(folder, modules, names, place)
        else:
            name = names.ours(place)
            if not isinstance(modules.get(name), _ADAPTABLE):
                raise _lacks(folder, place, lazy)
            if isinstance(modules[name], _EMBEDDINGS) and "lm_head" not in lazy.model:
                raise EdgeLoraError(
                    f"{folder.path}: adapts {place}, which is the vocabulary head as well; mlx-lm "
                    "would adapt both; merge the adapter with PEFT and convert the model instead"
                )
            parameter = f"{place}.weight" if names.is_parameter(place) else place
            result[name] = folder.pair(place, parameter)
    for place, parts in experts.items():
        result |= _single_experts(folder, modules, names, place, parts)
    return result


def _lacks(folder: PeftFolder, place: str, lazy: LazyModel | None = None) -> EdgeLoraError:
    where = f"the model in {lazy.source}" if lazy is not None else "the model"
    return EdgeLoraError(
        f"{folder.path}: adapts {place}, which {where} lacks; name the model that it was trained "
        "on with --model"
    )


def _mixture(
    folder: PeftFolder, modules: dict[str, nn.Module], names: Names, place: str
) -> dict[str, Pair]:
    """Divide an adapted parameter of experts into mlx-lm's matrices."""
    mixture = place.removesuffix(".base_layer")
    alone = len({mixture, f"{mixture}.base_layer"} & set(folder.tensors)) == 1
    parameters = folder.config.get("target_parameters") or []
    is_down = place == mixture
    if alone:  # the only wrapper is of the one parameter that is named
        is_down = not any(str(name).endswith("gate_up_proj") for name in parameters)
    switch = {name: names.switch(mixture, name) for name in ("gate_proj", "up_proj", "down_proj")}
    if not all(isinstance(modules.get(name), _SWITCHES) for name in switch.values()):
        raise _lacks(folder, mixture)
    count = modules[switch["down_proj"]].num_experts
    parameter = f"{mixture}.{'down_proj' if is_down else 'gate_up_proj'}"
    pair = folder.pair(place, parameter, count)
    a = pair.a.reshape(count, pair.rank, -1)
    b = pair.b.reshape(pair.b.shape[0], pair.rank, count).transpose(2, 0, 1)
    if is_down:
        return {switch["down_proj"]: Pair(a, b, None, pair.rank, pair.scale)}
    hidden = b.shape[1] // 2
    return {
        switch[name]: Pair(*matrices, None, matrices[0].shape[1], pair.scale)
        for name, matrices in _halves(a, b[:, :hidden], b[:, hidden:]).items()
    }


def _halves(a: mx.array, gate: mx.array, up: mx.array) -> dict[str, tuple[mx.array, mx.array]]:
    """Divide A [experts, rank, in] as B [experts, hidden, rank] of gate and of up use it."""
    if not mx.any(gate):
        return {"up_proj": (a, up)}
    if not mx.any(up):
        return {"gate_proj": (a, gate)}
    half = a.shape[1] // 2
    if a.shape[1] % 2 or mx.any(gate[..., half:]) or mx.any(up[..., :half]):
        return {"gate_proj": (a, gate), "up_proj": (a, up)}
    return {
        "gate_proj": (a[:, :half], gate[..., :half]),
        "up_proj": (a[:, half:], up[..., half:]),
    }


def _single_experts(
    folder: PeftFolder,
    modules: dict[str, nn.Module],
    names: Names,
    place: str,
    parts: dict[int, str],
) -> dict[str, Pair]:
    """Stack adapters of single experts, as those of transformers 4."""
    mixture, _, own = place.rpartition(".")
    if names.experts is None or own not in names.experts.names:
        raise _lacks(folder, place)
    projection = ("gate_proj", "up_proj", "down_proj")[names.experts.names.index(own)]
    name = names.switch(mixture.replace(f".{names.experts.block}.", ".mlp."), projection)
    if not isinstance(modules.get(name), _SWITCHES):
        raise _lacks(folder, place)
    if sorted(parts) != list(range(modules[name].num_experts)):
        raise EdgeLoraError(
            f"{folder.path / PEFT_WEIGHTS}: adapts {len(parts)} experts of {place}, expected all "
            f"{modules[name].num_experts}; name the model that it was trained on with --model"
        )
    pairs = [folder.pair(parts[i], parts[i]) for i in sorted(parts)]
    if len({(pair.a.shape, pair.b.shape, pair.scale) for pair in pairs}) != 1:
        raise EdgeLoraError(f"{folder.path}: the experts of {place} differ in shape or scale")
    a, b = mx.stack([pair.a for pair in pairs]), mx.stack([pair.b for pair in pairs])
    return {name: Pair(a, b, None, pairs[0].rank, pairs[0].scale)}


def _settings(folder: PeftFolder, pairs: dict[str, Pair], blocks: int) -> dict[str, Any]:
    """mlx-lm's configuration, which covers all adapted layers and perhaps more."""
    places = [re.fullmatch(r".*?\.layers\.(\d+)\.(.+)", name) for name in pairs]
    inside = [place for place in places if place]
    keys = {place[2] for place in inside} | {n for n, p in zip(pairs, places, strict=True) if not p}
    first = min((int(place[1]) for place in inside), default=blocks - 1)
    scale = Counter(pair.scale for pair in pairs.values()).most_common(1)[0][0]
    if scale == 0:
        raise EdgeLoraError(
            f"{folder.path / PEFT_CONFIG}: lora_alpha is 0, so that the adapter does nothing; "
            "expected another number"
        )
    return {
        "fine_tune_type": "dora" if folder.config.get("use_dora") else "lora",
        "num_layers": blocks - first,
        "lora_parameters": {
            "rank": max(pair.rank for pair in pairs.values()),
            "scale": scale,
            "dropout": folder.config.get("lora_dropout") or 0.0,
            "keys": sorted(keys),
        },
    }


def _weights(
    folder: PeftFolder, model: nn.Module, pairs: dict[str, Pair], scale: float
) -> dict[str, mx.array]:
    """All tensors of mlx-lm's adapted layers, unevaluated."""
    weights: dict[str, mx.array] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        a, b = layer.lora_a, mx.zeros(layer.lora_b.shape)
        m = layer.get("m")
        if name in pairs:
            pair = pairs[name]
            a, b = _matrices(pair, layer, pair.scale / scale)
            if m is not None:
                m = pair.m
        found = {"lora_a": (a, layer.lora_a), "lora_b": (b, layer.lora_b)}
        if "m" in layer:
            found["m"] = (m, layer.m)
        for leaf, (array, like) in found.items():
            if array is None or array.shape != like.shape:
                got = "none" if array is None else f"one for {array.shape}"
                raise EdgeLoraError(
                    f"{folder.path}: the tensor of {name} for {leaf} is {got}, expected "
                    f"{like.shape}; name the model that it was trained on with --model"
                )
            weights[f"{name}.{leaf}"] = array.astype(mx.float32)
    return weights


def _matrices(pair: Pair, layer: nn.Module, factor: float) -> tuple[mx.array, mx.array]:
    """The pair in mlx-lm's layout, as wide as the layer's rank."""
    if pair.a.ndim == 3:  # experts: [E, rank, in] and [E, out, rank]
        new = layer.lora_a[:, pair.rank :]
        missing = new.shape[1]
        a = mx.concatenate([pair.a, new], axis=1) if _same_width(pair.a, new, -1) else pair.a
        return a, mx.pad(factor * pair.b, [(0, 0), (0, 0), (0, missing)])
    a = pair.a.T
    new = layer.lora_a[:, pair.rank :]
    a = mx.concatenate([a, new], axis=1) if _same_width(a, new, 0) else a
    return a, mx.pad(factor * pair.b.T, [(0, new.shape[1]), (0, 0)])


def _same_width(a: mx.array, b: mx.array, axis: int) -> bool:
    """Whether two matrices can be side by side; others are refused with their shapes."""
    return a.shape[axis] == b.shape[axis] and a.shape[0] == b.shape[0]
