"""Merge adapters into their model, one tensor at a time.

mlx-lm's own layers do the arithmetic (`fuse` of its LoRA and DoRA layers), on arrays that MLX has
not read yet. Then tensors are computed, written and dropped one after the other, large ones a few
rows at a time. A model of any size needs the memory of a few tensors, and every tensor equals that
of `mlx_lm.fuse` bit for bit.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import dequantize_model, get_total_parameters, save_config

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.merged_rows import MERGED_ROWS, is_large, merged_rows
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel, drain
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import explain_misfit
from mlx_edgelora.storage.files import cannot_write, locked, sync, sync_folder, write_atomically
from mlx_edgelora.storage.safetensors import read_header, write_tensors
from mlx_edgelora.training.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_adapter,
    model_for,
    read_adapter_config,
)

# Largest size of a shard, as in mlx-lm.
SHARD_BYTES = 5 << 30
# Files for the tokenizer and generation, copied with the weights. Code is never copied.
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.jsonl")
NOT_COPIED = ("config.json", "model.safetensors.index.json")
_NOTE = "fuse.json"

Tensors = list[tuple[str, mx.array]]


def fuse(
    model: str | None,
    adapters: Sequence[str | os.PathLike],
    save_path: str | os.PathLike,
    weights: Sequence[float] | None = None,
    dequantize: bool = False,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write a model with adapters merged into its weights, in its own quantization.

    Needs memory for a few tensors, and disk space for the whole model.

    Args:
        model: a folder or a Hub name; None for the model that the first adapter was trained on.
        adapters: folders of the adapters.
        save_path: a folder that does not exist yet. After an interruption, the next call writes
            only the missing shards.
        weights: factor of each adapter; None for 1.
        dequantize: write dequantized weights.
        notify: called with a line for each shard.

    Returns:
        `save_path`.

    Raises:
        EdgeLoraError: an adapter does not fit the model or another adapter, or the disk is full;
            `save_path` is not created.
    """
    adapters, save_path = [Path(folder) for folder in adapters], Path(save_path)
    if os.path.lexists(save_path):
        raise EdgeLoraError(
            f"save_path: {save_path} exists, expected a new folder; remove it or choose another"
        )
    configs = [read_adapter_config(folder) for folder in adapters]
    for folder in adapters:
        if note := check_adapter(folder / WEIGHTS_FILE):
            notify(f"note: {note}")
        model = model_for(folder, model, notify)
    lazy = open_model(model, streamed=False, quantize=None, cache=Path())
    stamp = _stamp(lazy, adapters, weights, dequantize)
    large: dict[str, nn.Module] = {}
    config = merge(lazy, adapters, configs, weights, dequantize, large)
    building = save_path.with_name(f".{save_path.name}.building")
    if building.is_symlink():  # the folder that it points to must not be emptied
        raise EdgeLoraError(f"save_path: {building} is a link, expected none; remove it")
    try:
        building.mkdir(parents=True, exist_ok=True)
        with locked(building, "--save-path"):
            if os.path.lexists(save_path):  # created by another run meanwhile
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            _begin(building, stamp)
            _write(building, lazy, config, _Merged(large, dequantize), notify)
            (building / _NOTE).unlink()
            sync_folder(building)
            os.replace(building, save_path)
            with contextlib.suppress(
                OSError
            ):  # it is complete, and at worst lost by a power failure
                (save_path / ".lock").unlink(missing_ok=True)
                sync_folder(save_path.parent)
    except OSError as error:
        raise cannot_write(save_path, error) from error
    return save_path


def _stamp(
    lazy: LazyModel, adapters: Sequence[Path], weights: Sequence[float] | None, dequantize: bool
) -> str:
    """A hash of all inputs of a fusion, so that shards of other inputs are not reused."""
    digest = hashlib.sha256(repr((weights, dequantize)).encode())
    for shard in sorted({shard for shard, _ in lazy.checkpoint.tensors.values()}):
        status = shard.stat()
        digest.update(repr((shard.name, status.st_size, status.st_mtime_ns)).encode())
    for folder in adapters:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with open(folder / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def merge(
    lazy: LazyModel,
    adapters: Sequence[Path],
    configs: Sequence[dict],
    weights: Sequence[float] | None,
    dequantize: bool,
    large: dict[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Replace the model's parameters by the merged ones, unevaluated.

    Args:
        lazy: the model without adapters; changed in place.
        adapters: folders of the adapters.
        configs: their configurations.
        weights: factor of each adapter; None for 1.
        dequantize: unpack all weights.
        large: filled with the LoRA layers that are too large to be merged at once, by name; the
            model then has arrays of their shapes, which mean nothing. None to merge all layers.

    Returns:
        The configuration of the merged model.

    Raises:
        EdgeLoraError: an adapter does not fit the model or another adapter.
    """
    with explain_misfit(adapters[0], lazy.source):
        if len(adapters) == 1 and weights is None:
            load_adapters(lazy.model, str(adapters[0]))
        else:
            _add_adapters(lazy.model, adapters, configs, weights or [1.0] * len(adapters))
    fused = []
    for name, module in lazy.model.named_modules():
        if not hasattr(module, "fuse"):
            continue
        merged = module.fuse(dequantize=dequantize)
        if large is not None and is_large(module):
            large[name] = module
            for leaf in MERGED_ROWS & merged.keys():
                merged[leaf] = mx.zeros(merged[leaf].shape, merged[leaf].dtype)
        fused.append((name, merged))
    lazy.model.update_modules(tree_unflatten(fused))
    config = dict(lazy.config)
    if dequantize:
        with contextlib.redirect_stdout(io.StringIO()):
            lazy.model = dequantize_model(lazy.model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    return config


def _add_adapters(
    model: nn.Module, adapters: Sequence[Path], configs: Sequence[dict], weights: Sequence[float]
) -> None:
    """Give each adapted layer one LoRA layer that concatenates the ranks of all adapters."""
    parts: dict[str, list[tuple[mx.array, mx.array]]] = {}
    for folder, config, weight in zip(adapters, configs, weights, strict=True):
        if config.get("fine_tune_type", "lora") != "lora":
            raise EdgeLoraError(
                f"{folder}: is of type {config['fine_tune_type']}, expected lora: no other can be "
                "added to another or weighted"
            )
        factor = weight * config["lora_parameters"]["scale"]
        arrays = mx.load(str(folder / WEIGHTS_FILE))
        for name in [name for name in arrays if name.endswith(".lora_a")]:
            place = name.removesuffix(".lora_a")
            parts.setdefault(place, []).append((arrays[name], factor * arrays[f"{place}.lora_b"]))
    # mlx-lm names layers relative to their block; layers outside the blocks have full names.
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", place, count=1) for place in parts})
    settings = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings)
    changed = []
    for name, layer in model.named_modules():
        if not hasattr(layer, "fuse"):
            continue
        if name in parts:
            _set_side_by_side(layer, parts.pop(name))
        else:
            changed.append((name, layer["linear" if "linear" in layer else "embedding"]))
    model.update_modules(tree_unflatten(changed))
    if parts:
        raise EdgeLoraError(f"{adapters[0]}: adapts {next(iter(parts))}, which the model lacks")


def _set_side_by_side(layer: nn.Module, parts: Sequence[tuple[mx.array, mx.array]]) -> None:
    """Concatenate lora_a [in, r] and lora_b [r, out]; of experts [E, r, in] and [E, out, r]."""
    a, b = zip(*parts, strict=True)
    rank_of_a, rank_of_b = (1, 2) if b[0].ndim == 3 else (1, 0)
    layer.lora_a = mx.concatenate(a, axis=rank_of_a)
    layer.lora_b = mx.concatenate(b, axis=rank_of_b)


def _begin(building: Path, stamp: str) -> None:
    """Remove all files except the shards of an interrupted run with the same inputs."""
    try:
        same = json.loads((building / _NOTE).read_bytes()) == {"inputs": stamp}
    except (OSError, ValueError):
        same = False
    for path in building.iterdir():
        if path.name != ".lock" and not (same and path.suffix == ".safetensors"):
            path.unlink()
    text = json.dumps({"inputs": stamp}).encode()
    write_atomically({building / _NOTE: lambda file: file.write(text)})


class _Merged:
    """The arrays of shards in their order, with those of large layers computed when they are due.

    Args:
        layers: the large LoRA layers by name, which are dropped one after the other.
        dequantize: unpack their weights.
    """

    def __init__(self, layers: dict[str, nn.Module], dequantize: bool) -> None:
        self._layers, self._dequantize = layers, dequantize
        self._found: dict[str, mx.array] = {}

    def arrays(self, shard: Tensors) -> Iterator[mx.array]:
        """The arrays of a shard, which then no longer holds them."""
        names = [name for name, _ in shard]
        for name, array in zip(names, drain(shard), strict=True):
            place, _, leaf = name.rpartition(".")
            if place in self._layers and leaf in MERGED_ROWS:
                merged = merged_rows(self._layers.pop(place), self._dequantize)
                self._found = {f"{place}.{key}": value for key, value in merged.items()}
                del merged
            yield self._found.pop(name, array)


def _write(
    building: Path,
    lazy: LazyModel,
    config: dict[str, Any],
    merged: _Merged,
    notify: Callable[[str], None],
) -> None:
    parameters = tree_flatten(lazy.model.parameters())
    parameters += _other_towers(lazy, {name for name, _ in parameters}, config)
    count = get_total_parameters(lazy.model)
    total = sum(array.nbytes for _, array in parameters)
    lazy.raw.clear()
    lazy.model = None  # a reference to the arrays would keep their results in memory
    shards = _shards(parameters)
    parameters.clear()
    index = {"metadata": {"total_size": total, "total_parameters": count}, "weight_map": {}}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names = [key for key, _ in shard]
        done += sum(array.nbytes for _, array in shard)
        index["weight_map"] |= dict.fromkeys(names, name)
        if (building / name).exists() and list(read_header(building / name)) == names:
            shard.clear()
            continue
        specs = {key: (array.dtype, array.shape) for key, array in shard}
        write_atomically(
            {
                building / name: lambda file, specs=specs, shard=shard: write_tensors(
                    file, specs, merged.arrays(shard)
                )
            }
        )
        lazy.checkpoint.files.check()
        notify(f"{name} written, {size(done)} of {size(total)}")
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    text = json.dumps(index, indent=4).encode()
    write_atomically({building / NOT_COPIED[1]: lambda file: file.write(text)})
    _copy_companions(lazy.source, building)
    save_config(config, building / "config.json")
    with open(building / "config.json", "rb+") as file:
        sync(file.fileno())


def _other_towers(lazy: LazyModel, taken: set[str], config: dict[str, Any]) -> Tensors:
    """What mlx-lm leaves out of a model, such as its vision tower, as it is stored.

    Args:
        lazy: the model.
        taken: names of its parameters.
        config: that of the merged model; one without quantization gets unpacked tensors.
    """
    names = set(lazy.find_other_towers()) - taken
    stored = [(place.name, array) for array, place in lazy.raw.values() if place.name in names]
    quantization = lazy.config.get("quantization")
    if quantization is None or "quantization" in config:
        return stored
    arrays, unpacked = dict(stored), []
    for name, array in stored:
        path, _, leaf = name.rpartition(".")
        scales, biases = arrays.get(f"{path}.scales"), arrays.get(f"{path}.biases")
        if scales is None:
            unpacked.append((name, array))
        elif leaf == "weight":
            own = quantization.get(path) or quantization
            settings = {key: own[key] for key in ("group_size", "bits", "mode") if key in own}
            unpacked.append((name, mx.dequantize(array, scales, biases, **settings)))
        elif leaf not in ("scales", "biases"):
            unpacked.append((name, array))
    return unpacked


def _shards(parameters: Tensors) -> list[Tensors]:
    """Divide parameters into shards, as mlx-lm does."""
    shards: list[Tensors] = []
    filled = 0
    for name, array in parameters:
        if not shards or filled + array.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, array))
        filled += array.nbytes
    return shards


def _copy_companions(source: Path, building: Path) -> None:
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, building / path.name)
