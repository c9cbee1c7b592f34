"""Find and check a model folder, and rewrite it once if its tensors cannot be streamed."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.text import say
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.config_checks import check_config, checked_sanitize
from mlx_edgelora.model.other_towers import other_towers, unchanged
from mlx_edgelora.model.weights import TensorLocation
from mlx_edgelora.storage.files import WatchedFiles, sync, sync_folder
from mlx_edgelora.storage.safetensors import TensorInfo, read_header, write_tensors
from mlx_edgelora.storage.temporaries import remove, remove_left_overs, temporary_folder

# Layers with floating parameters only, and layers with packed ones.
FLOATING = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm)
PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
# Errors of mlx-lm for a config.json or tensors that make no model; its olmo exits the process if a
# package is missing.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    SystemExit,
    TypeError,
    ValueError,
)
# The files that a model needs from the Hub; Python files are never downloaded.
HUB_PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
# Limit of config.json and of the index of shards, in bytes; those of large models have 5 MB.
MOST_JSON = 50_000_000
# Part of a converted copy's name: increase it when the written format changes.
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder.

    Attributes:
        path: the folder.
        config: its config.json.
        tensors: for every tensor its shard and place in it, from checked headers.
        files: watches config.json and the shards for changes.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[Path, TensorInfo]]
    files: WatchedFiles


@dataclass
class LazyModel:
    """A model whose weights are not in memory yet.

    Attributes:
        model: an mlx-lm model whose parameters are unevaluated.
        config: its configuration, quantization included.
        checkpoint: where its weights are.
        source: the folder that the user named, with the tokenizer; not the checkpoint's folder if
            the weights were rewritten.
        raw: the arrays of the shards by the id of the Python object, with their location on disk;
            a parameter found here can be read again from its shard.
        vocabulary: number of logits.
        streamable: whether every parameter is stored in a shard as the model uses it.
        blocks: the model's blocks, once it was adapted and checked.
        find_other_towers: returns the names of the tensors of vision and other towers.
    """

    model: nn.Module
    config: dict[str, Any]
    checkpoint: Checkpoint
    raw: dict[int, tuple[mx.array, TensorLocation]]
    source: Path
    vocabulary: int
    streamable: bool = True
    blocks: BlockList | None = None
    find_other_towers: Callable[[], list[str]] = list

    def replace_with(self, other: "LazyModel") -> None:
        """Take over another model's state, so that the old weights can be freed."""
        vars(self).update(vars(other))

    def location(self, array: mx.array) -> TensorLocation | None:
        """Location of a parameter on disk; None if mlx-lm computes it from stored tensors."""
        found = self.raw.get(id(array))
        return found[1] if found else None


def resolve_model(name: str) -> Path:
    """Find a model: a folder, or the name of one on the Hugging Face Hub.

    Raises:
        EdgeLoraError: it is neither a folder nor a repository that can be reached.
    """
    if os.path.isdir(folder := os.path.expanduser(name)):
        return Path(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise EdgeLoraError(
            f"model: {name!r} is not a folder, expected a model folder or a Hub name such as "
            "mlx-community/Llama-3.2-3B-Instruct-4bit; check the path"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EdgeLoraError(
            f"model: {name!r} is not a folder here and cannot be fetched from the Hub "
            f"({error_text(error)}); check the name, the network and the access rights"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a model folder before it is used: config, index, every shard's header.

    Raises:
        EdgeLoraError: a file is missing, truncated or invalid.
    """
    files = WatchedFiles()
    config = _read_json(path / "config.json")
    files.watch(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise EdgeLoraError(
            f"{path / 'config.json'}: no model_type, expected an architecture of mlx-lm such as "
            "'llama'; use a model that mlx-lm can load"
        )
    if "model_file" in config:
        raise EdgeLoraError(
            f"{path / 'config.json'}: asks to run its own code ({config['model_file']!r}), which "
            "is never done here; use a model of an architecture that mlx-lm has"
        )
    shards = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    expected = _read_json(index).get("weight_map", {}) if index.exists() else {}
    if not isinstance(expected, dict) or not all(isinstance(f, str) for f in expected.values()):
        raise EdgeLoraError(
            f"{index}: weight_map does not name a file for every tensor; download the model again"
        )
    missing = sorted(set(expected.values()) - {shard.name for shard in shards})
    if missing or not shards:
        raise EdgeLoraError(
            f"{path}: {missing[0] if missing else 'model*.safetensors'} is missing, expected every "
            "shard of the model; download it again"
        )
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for shard in shards:
        files.watch(shard)
        for name, info in read_header(shard).items():
            if name in tensors:
                raise EdgeLoraError(
                    f"{shard}: tensor {name!r} is also in {tensors[name][0].name}, expected it "
                    "once; remove the shards of another model"
                )
            tensors[name] = shard, info
    lacking = sorted(set(expected) - set(tensors))
    if lacking:
        raise EdgeLoraError(
            f"{path}: the index names tensor {lacking[0]!r}, which no shard has; download it again"
        )
    check_config(path / "config.json", config, tensors)
    return Checkpoint(path, config, tensors, files)


def load_lazily(checkpoint: Checkpoint) -> LazyModel:
    """Build the model with unevaluated parameters and record where each one is stored.

    Raises:
        EdgeLoraError: mlx-lm does not know the architecture or the tensors do not fit it.
    """
    raw: dict[int, tuple[mx.array, TensorLocation]] = {}
    find_towers: list[Callable[[], list[str]]] = []
    try:
        model, config = load_model(
            checkpoint.path,
            lazy=True,
            get_model_classes=lambda config: _recording_classes(
                config, checkpoint, raw, find_towers
            ),
        )
        _check_dtypes(checkpoint.path, model)
        # Builds a graph and reads nothing: some wrong settings only fail in a call.
        vocabulary = model(mx.zeros((1, 4), mx.int32)).shape[-1]
    except BUILD_ERRORS as error:
        raise EdgeLoraError(
            f"{checkpoint.path}: mlx-lm cannot build this model "
            f"({type(error).__name__}: {error_text(error)}); use a model that it can load"
        ) from error
    checkpoint.files.check()  # mlx-lm read them again
    return LazyModel(
        model,
        config,
        checkpoint,
        raw,
        checkpoint.path,
        vocabulary,
        find_other_towers=find_towers[-1],
    )


def _check_dtypes(path: Path, model: nn.Module) -> None:
    """Refuse tensors of a dtype that their layer cannot have: mlx-lm checks shapes only."""
    for place, module in model.named_modules():
        if type(module) not in (*FLOATING, *PACKED):
            continue
        whole = {"weight"} if type(module) in PACKED else set()
        if whole and module.mode != "affine":
            whole.add("scales")
        for name, array in module.items():
            if not isinstance(array, mx.array):
                continue
            if mx.issubdtype(array.dtype, mx.floating) == (name in whole):
                raise EdgeLoraError(
                    f"{path}: {place}.{name} has dtype {array.dtype}, which a "
                    f"{type(module).__name__} cannot have; download the model again"
                )


def _unread(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """All tensors of a checkpoint, not evaluated."""
    shards = {shard for shard, _ in checkpoint.tensors.values()}
    return {name: array for shard in shards for name, array in mx.load(str(shard)).items()}


def _recording_classes(
    config: dict, checkpoint: Checkpoint, raw: dict, find_towers: list[Callable]
) -> tuple[Callable, Any]:
    """mlx-lm's classes for a config, which record the weights before `sanitize` changes them."""
    model_class, args_class = _get_classes(config)

    def build(args: Any) -> nn.Module:
        model = model_class(args)
        sanitize = checked_sanitize(model, getattr(model, "sanitize", lambda weights: weights))

        def record_and_sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            for name, array in weights.items():
                raw[id(array)] = array, TensorLocation(checkpoint.tensors[name][0], name)
            object.__delattr__(model, "sanitize")
            before = dict(weights)
            found = sanitize(weights)
            used, names = unchanged(before, found), set(found)

            def find() -> list[str]:  # holds neither arrays nor the model, which may be let go
                method = getattr(model_class(args), "sanitize", dict)
                return other_towers(_unread(checkpoint), used, names, method)

            find_towers.append(find)
            return found

        object.__setattr__(model, "sanitize", record_and_sanitize)
        return model

    return build, args_class


def convert_checkpoint(lazy: LazyModel, cache: Path, quantize: int | None = None) -> Path:
    """Write the model once as plain MLX shards, quantized or not, and reuse the copy later.

    Args:
        lazy: the model; it cannot be used afterwards.
        cache: the folder of such copies.
        quantize: bits of affine quantization in groups of 64, or None.

    Returns:
        The copy's folder. Memory: a few tensors at a time.

    Raises:
        EdgeLoraError: the cache cannot be written, or the model changed meanwhile.
    """
    checkpoint = lazy.checkpoint
    folder = cache / f"{checkpoint.path.resolve().name}-{_fingerprint(checkpoint, quantize)}"
    if _is_complete(folder):
        return folder
    model, config = lazy.model, lazy.config
    if quantize is not None:
        config = quantize_in_place(lazy, quantize)
    parameters = tree_flatten(model.parameters())
    lazy.raw.clear()
    lazy.model = model = None
    try:
        remove_left_overs(cache)
        with temporary_folder(folder, 0o700) as building:
            write_model(building, parameters, config)
            checkpoint.files.check()
            os.replace(building, folder)
        sync_folder(cache)
    except OSError as error:
        if (folder / "config.json").exists():  # another run was faster
            return folder
        free = f", {size(shutil.disk_usage(cache).free)} free" if cache.is_dir() else ""
        raise EdgeLoraError(
            f"{folder}: the converted model cannot be written ({error.strerror}{free}); free some "
            "space or choose another folder with --cache-dir"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether there is a converted model; a damaged one is removed, so that it is made again."""
    if not folder.exists():
        return False
    try:
        read_checkpoint(folder)
    except EdgeLoraError as error:
        say(f"note: the converted model is made again, for it is damaged: {error}")
        remove(folder)
        return False
    return True


def quantize_in_place(lazy: LazyModel, bits: int) -> dict[str, Any]:
    """Quantize the model lazily, in place, in groups of 64; returns its new config."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where a library should not
        _, config = quantize_model(lazy.model, lazy.config, 64, bits)
    return config


def write_model(folder: Path, parameters: list[tuple[str, mx.array]], config: dict) -> None:
    """Write one shard and config.json, synced; `parameters` is emptied tensor by tensor."""
    specs = {name: (array.dtype, array.shape) for name, array in parameters}
    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, specs, drain(parameters))
        file.flush()
        sync(file.fileno())
    save_config(config, folder / "config.json")
    with open(folder / "config.json", "rb+") as file:
        sync(file.fileno())
    sync_folder(folder)


def drain(parameters: list[tuple[str, mx.array]]) -> Iterator[mx.array]:
    """The arrays of a list in its order, each of which the list then no longer holds."""
    parameters.reverse()
    while parameters:
        yield parameters.pop()[1]


def _fingerprint(checkpoint: Checkpoint, quantize: int | None) -> str:
    shards = sorted({shard for shard, _ in checkpoint.tensors.values()})
    stamps = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    config = json.dumps(checkpoint.config, sort_keys=True)
    text = repr((FORMAT, str(checkpoint.path.resolve()), stamps, config, quantize))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_JSON or not path.is_file():
            raise EdgeLoraError(
                f"{path}: is no file of at most {size(MOST_JSON)}; download the model again"
            )
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EdgeLoraError(
            f"{path}: cannot be read as JSON ({error_text(error)}); download the model again"
        ) from error
    if not isinstance(content, dict):
        raise EdgeLoraError(f"{path}: not a JSON object; download the model again")
    return content


def error_text(error: Exception) -> str:
    """The text of a library's error, to be quoted in an error message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"no key {error}"
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
