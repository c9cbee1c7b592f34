"""Adapter folders as mlx-lm reads and writes them: weights, config, numbered checkpoints."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from mlx_edgelora.engine.finite import first_non_finite
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import WatchedFiles, make_folder, write_atomically
from mlx_edgelora.storage.safetensors import TensorInfo, read_header, write_tensors
from mlx_edgelora.training.text import abbreviate

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

_FLOATS = ("F32", "F16", "BF16")


def save_adapters(
    path: str | os.PathLike,
    weights: Mapping[str, mx.array],
    config: Mapping[str, object],
    step: int | None = None,
) -> None:
    """Write an adapter folder that mlx-lm loads; the old one stands until the new one is whole.

    Args:
        path: the folder; created where missing.
        weights: LoRA parameters by their names in the model; looked at one by one, so that
            a mapping that reads them from a file costs one of them.
        config: becomes `adapter_config.json`; JSON values only.
        step: also keep the weights as `<step, 7 digits>_adapters.safetensors`.

    Raises:
        EdgeLoraError: a weight is NaN or infinite, the disk is full or the folder
            cannot be written; what stood in the folder is untouched.
    """
    folder = Path(path)
    specs = {}
    for name, array in weights.items():
        specs[name] = (array.dtype, array.shape)
        if first_non_finite({name: array}) is not None:
            raise EdgeLoraError(
                f"{folder}: not saved: {name} holds NaN or infinity, expected finite numbers; "
                "lower the learning rate and resume from the last good adapter"
            )
    text = json.dumps(dict(config), indent=4, sort_keys=True) + "\n"

    def write_weights(file: BinaryIO) -> None:
        write_tensors(file, specs, weights.values())

    make_folder(folder)
    writers = {folder / CONFIG_FILE: lambda file: file.write(text.encode())}
    if step is not None:
        # A second copy, not a hard link: mlx-lm overwrites adapters.safetensors in
        # place, which would change a linked checkpoint as well.
        writers[folder / f"{step:07d}_{WEIGHTS_FILE}"] = write_weights
    writers[folder / WEIGHTS_FILE] = write_weights
    write_atomically(writers)


def load_adapter_weights(
    file: str | os.PathLike, expected: Mapping[str, Sequence[int]]
) -> dict[str, mx.array]:
    """All that `read_adapter_weights` gives, by name."""
    return dict(read_adapter_weights(file, expected))


def read_adapter_weights(
    file: str | os.PathLike, expected: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, mx.array]]:
    """Read an adapter file that must fit the model exactly, one array at a time.

    Args:
        file: a safetensors file, such as `adapters/adapters.safetensors`.
        expected: shape by name of every LoRA parameter of the model.

    Yields:
        Name and float32 array, evaluated, in the order of `expected`. Memory: one of them.

    Raises:
        EdgeLoraError: the file is missing or damaged, a tensor is missing, unexpected,
            of another shape, not of a float dtype, or holds NaN or infinity.
    """
    header, files = read_header(file), WatchedFiles()
    files.watch(Path(file))
    _check_names(file, header, expected)
    for name, info in header.items():
        _check_tensor(file, name, info, tuple(expected[name]))
    loaded = mx.load(os.fspath(file), format="safetensors")
    for name in expected:
        array = loaded.pop(name).astype(mx.float32)
        mx.eval(array)
        files.check()
        if first_non_finite({name: array}) is not None:
            raise EdgeLoraError(
                f"{file}: {name} holds NaN or infinity, expected finite numbers; "
                "resume from an earlier checkpoint"
            )
        yield name, array
        del array


def _check_names(
    file: str | os.PathLike, header: Mapping[str, TensorInfo], expected: Mapping[str, object]
) -> None:
    missing = [name for name in expected if name not in header]
    unexpected = [name for name in header if name not in expected]
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
            "resume from a file of LoRA weights"
        )
