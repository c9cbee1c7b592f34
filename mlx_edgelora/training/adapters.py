"""Adapter folders in mlx-lm's format: weights, configuration and numbered checkpoints."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edgelora.blocks.trained import is_adapter
from mlx_edgelora.config import LoraParameters
from mlx_edgelora.config.kinds import MAPPING, integer, one_of, read_value
from mlx_edgelora.engine.finite import first_non_finite
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import error_text, resolve_model
from mlx_edgelora.model.hashes import weights_fingerprint
from mlx_edgelora.storage.files import WatchedFiles, Writer, make_folder, write_atomically
from mlx_edgelora.storage.safetensors import (
    DTYPES,
    TensorInfo,
    read_header,
    read_metadata,
    verify_checksum,
    write_tensors,
)
from mlx_edgelora.training.text import abbreviate

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

# Metadata of the file of weights: the fingerprint of the model that they were trained on.
_BASE = "base_model"
_FLOATS = ("F32", "F16", "BF16")


def save_adapters(
    path: str | os.PathLike,
    weights: Mapping[str, mx.array],
    config: Mapping[str, object],
    step: int | None = None,
    base: str | None = None,
) -> None:
    """Write an adapter folder that mlx-lm loads; old files stay until the new ones are complete.

    Args:
        path: the folder; created if missing.
        weights: LoRA parameters by their names in the model. They are read one at a time, so a
            mapping that reads them from a file needs memory for one of them.
        config: content of `adapter_config.json`; JSON values only.
        step: also write the weights to `<step, 7 digits>_adapters.safetensors`.
        base: `weights_fingerprint` of the base model; None if unknown.

    Raises:
        EdgeLoraError: a weight is NaN or infinite, the disk is full or the folder cannot be
            written. The files in the folder are unchanged.
    """
    folder = Path(path)
    write_weights = adapter_writer(folder, weights, config, base)
    text = json.dumps(dict(config), indent=4, sort_keys=True) + "\n"
    make_folder(folder)
    writers = {folder / CONFIG_FILE: lambda file: file.write(text.encode())}
    if step is not None:
        # A second copy, not a hard link: mlx-lm overwrites adapters.safetensors in place, which
        # would change a linked checkpoint as well.
        writers[folder / f"{step:07d}_{WEIGHTS_FILE}"] = write_weights
    writers[folder / WEIGHTS_FILE] = write_weights
    # A crash between the renames of two files would leave the weights of one run with the
    # configuration of another. Weights that do not match the new configuration are removed first.
    outdated = None if _goes_with(folder, config) else folder / WEIGHTS_FILE
    write_atomically(writers, outdated)


def adapter_writer(
    folder: Path,
    weights: Mapping[str, mx.array],
    config: Mapping[str, object],
    base: str | None = None,
) -> Writer:
    """Make the writer of a weights file, whose metadata has the LoRA options and a checksum.

    Args:
        folder: named in error messages.
        weights: LoRA parameters by name; read twice, one at a time.
        config: options of the run.
        base: `weights_fingerprint` of the base model; None if unknown.

    Returns:
        A function that writes to an open file.

    Raises:
        EdgeLoraError: a weight is NaN or infinite.
    """
    specs = {}
    for name, array in weights.items():
        specs[name] = (array.dtype, array.shape)
        if first_non_finite({name: array}) is not None:
            raise EdgeLoraError(
                f"{folder}: not saved: {name} holds NaN or infinity, expected finite numbers; "
                "lower the learning rate and resume from the last good adapter"
            )
    metadata = {"lora": json.dumps(_shape_of_lora(config), sort_keys=True)}
    if base is not None:
        metadata[_BASE] = base
    return lambda file: write_tensors(file, specs, weights.values(), metadata)


def _shape_of_lora(config: Mapping[str, object]) -> dict[str, object]:
    """The options that decide what an adapter's weights mean."""
    parameters = config.get("lora_parameters") or {}
    return {
        "fine_tune_type": config.get("fine_tune_type"),
        "num_layers": config.get("num_layers"),
        **{key: parameters.get(key) for key in ("rank", "scale", "keys")},
    }


def _goes_with(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether a folder has no weights, or weights of an adapter with this configuration."""
    if not (folder / WEIGHTS_FILE).exists():
        return True
    try:
        saved = json.loads((folder / CONFIG_FILE).read_bytes())
        return _shape_of_lora(saved) == _shape_of_lora(json.loads(json.dumps(dict(config))))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration in an adapter's folder.

    Raises:
        EdgeLoraError: there is none, or it is not a JSON object.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EdgeLoraError(
            f"{folder}: is not the folder of an adapter ({error_text(error)}), expected "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}; mlx-edgelora train makes one"
        ) from error
    if not isinstance(config, dict):
        raise EdgeLoraError(f"{folder / CONFIG_FILE}: got {type(config).__name__}, expected a map")
    _check_lora(f"{folder / CONFIG_FILE}: ", config)
    return config


def _check_lora(place: str, config: Mapping[str, Any]) -> None:
    """Check the options that mlx-lm builds LoRA layers by; other programs may write more."""
    kind = config.get("fine_tune_type", "lora")
    read_value(f"{place}fine_tune_type", kind, one_of("lora", "dora", "full"))
    if kind == "full":
        return
    read_value(f"{place}num_layers", config.get("num_layers"), integer(-1))
    parameters = read_value(f"{place}lora_parameters", config.get("lora_parameters"), MAPPING)
    for field in dataclasses.fields(LoraParameters):
        value = parameters.get(field.name, field.default)
        if value is not None or field.default is not None:
            read_value(f"{place}lora_parameters.{field.name}", value, field.metadata["kind"])


def base_model(folder: Path) -> str:
    """The model that an adapter was trained on, as its configuration names it.

    Raises:
        EdgeLoraError: as `read_adapter_config`, or no model is named.
    """
    model = read_adapter_config(folder).get("model")
    if not isinstance(model, str):
        raise EdgeLoraError(f"{folder / CONFIG_FILE}: names no model; give one with --model")
    return model


def model_for(folder: Path, model: str | None, notify: Callable[[str], None]) -> str:
    """The model to use an adapter with: the one given, or the one that its configuration names.

    The fingerprint of the model that the adapter was trained on is kept with its weights. A given
    model may be another one, such as one with more bits.

    Args:
        folder: the adapter's folder.
        model: a folder or a Hub name; None for the model that the adapter names.
        notify: called with a note if the given model is another one.

    Returns:
        A folder or a Hub name.

    Raises:
        EdgeLoraError: no model is named or it cannot be read, or it was replaced by another one
            after the training.
    """
    read_adapter_config(folder)
    name = model or base_model(folder)
    if (note := other_base(adapter_file(folder), name)) is None:
        return name
    if model is None:
        raise EdgeLoraError(
            f"{folder}: was trained on other weights than those that are in {name} now; put the "
            "model back, or use the adapter with this one all the same with --model"
        )
    notify(f"note: {note}")
    return name


def other_base(file: Path, model: str) -> str | None:
    """A note if an adapter's file was not trained on a model; None if it was, or nothing is known.

    Raises:
        EdgeLoraError: a file cannot be read.
    """
    saved = None if file.suffix == ".npz" else read_metadata(file).get(_BASE)
    if saved is None or saved == weights_fingerprint(resolve_model(model)):
        return None
    return f"{file.parent} was trained on other weights than those of {model}; results may be worse"


def adapter_file(place: str | os.PathLike) -> Path:
    """Path of an adapter's weights file, given that file or the adapter's folder.

    Raises:
        EdgeLoraError: the folder has no weights file.
    """
    path = Path(place)
    if not path.is_dir():
        return path
    if not (path / WEIGHTS_FILE).exists():
        raise EdgeLoraError(
            f"{path}: has no {WEIGHTS_FILE}, expected an adapter's folder or its file of weights"
        )
    return path / WEIGHTS_FILE


def check_adapter(file: Path) -> str | None:
    """Compare an adapter's file with its checksum and with the configuration in its folder.

    Returns:
        A note if the file has no checksum, as in files of other programs; otherwise None.

    Raises:
        EdgeLoraError: the file is damaged, or does not match the configuration.
    """
    if file.suffix == ".npz":
        return f"{file} has no checksum, so that damage to it cannot be seen"
    if not verify_checksum(file):
        return f"{file} has no checksum, so that damage to it cannot be seen"
    lora = read_metadata(file).get("lora")
    path = file.parent / CONFIG_FILE
    if lora is not None and path.exists():
        try:
            saved = _shape_of_lora(json.loads(path.read_bytes()))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise EdgeLoraError(f"{path}: not the configuration of an adapter") from error
        if saved != json.loads(lora):
            raise EdgeLoraError(
                f"{file}: was trained with {lora}, but {path.name} says "
                f"{json.dumps(saved, sort_keys=True)}; put back the files that belong together"
            )
    return None


def read_adapter_weights(
    file: str | os.PathLike, expected: Mapping[str, mx.array]
) -> Iterator[tuple[str, mx.array]]:
    """Read an adapter file that must fit the model, one array at a time.

    Args:
        file: a safetensors file, such as `adapters/adapters.safetensors`, or an `.npz` file of an
            early version of mlx-lm.
        expected: the trained parameters of the model by name, for their shapes and dtypes; they
            are not evaluated.

    Yields:
        Name and evaluated array, in the order of `expected`. One array is in memory at a time.
        Other tensors of a file of adapters are ignored, as in mlx-lm.

    Raises:
        EdgeLoraError: the file is missing or damaged, or a tensor is missing, has another shape,
            has no float dtype, or contains NaN or infinity.
    """
    files = WatchedFiles()
    files.watch(Path(file))
    loaded = _open_adapter(Path(file), expected)
    for name in expected:
        array = loaded.pop(name).astype(expected[name].dtype)
        mx.eval(array)
        files.check()
        if first_non_finite({name: array}) is not None:
            raise EdgeLoraError(
                f"{file}: {name} holds NaN or infinity, expected finite numbers; "
                "resume from an earlier checkpoint"
            )
        yield name, array
        del array


def _open_adapter(file: Path, expected: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of a file by name: names, shapes and dtypes are checked, data is not read."""
    if file.suffix == ".npz":
        try:
            loaded = mx.load(os.fspath(file), format="npz")
        except (RuntimeError, ValueError, OSError) as error:
            raise EdgeLoraError(f"{file}: is not a file of arrays ({error})") from error
        kinds = {dtype: name for name, (dtype, _) in DTYPES.items()}
        header = {
            name: TensorInfo(kinds.get(array.dtype, str(array.dtype)), array.shape, 0, 0)
            for name, array in loaded.items()
        }
    else:
        header = read_header(file)
        try:
            loaded = mx.load(os.fspath(file), format="safetensors")
        except (RuntimeError, ValueError, TypeError) as error:
            raise EdgeLoraError(
                f"{file}: MLX cannot read it ({error_text(error)}); use an earlier checkpoint"
            ) from error
    _check_names(file, header, expected)
    for name in expected:
        _check_tensor(file, name, header[name], expected[name].shape)
    return loaded


def _check_names(
    file: str | os.PathLike, header: Mapping[str, TensorInfo], expected: Mapping[str, object]
) -> None:
    missing = [name for name in expected if name not in header]
    # mlx-lm ignores weights of blocks or layers that are not adapted. Here they are an error,
    # because a part of the adapter would be lost.
    # A file of a full fine-tuning holds nothing but trained weights.
    full = not all(map(is_adapter, expected))
    unexpected = [n for n in header if n not in expected and (full or is_adapter(n))]
    problems = []
    if missing:
        problems.append(f"lacks {abbreviate(missing)}")
    if unexpected:
        problems.append(f"has {abbreviate(unexpected)}, not in this model")
    if problems:
        raise EdgeLoraError(
            f"{file}: does not fit: {' and '.join(problems)}; resume with the model, num_layers "
            "and lora_parameters the adapter was trained with"
        )


def _check_tensor(
    file: str | os.PathLike, name: str, info: TensorInfo, shape: tuple[int, ...]
) -> None:
    if info.shape != shape:
        raise EdgeLoraError(
            f"{file}: {name} has shape {info.shape}, expected {shape}; resume with the model and "
            "lora_parameters (rank) the adapter was trained with"
        )
    if info.dtype not in _FLOATS:
        raise EdgeLoraError(
            f"{file}: {name} has dtype {info.dtype}, expected one of {', '.join(_FLOATS)}; "
            "resume from a file of trained weights"
        )
