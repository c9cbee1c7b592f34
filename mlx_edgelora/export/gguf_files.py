"""Write a LoRA adapter, or a model with the adapter merged into it, as GGUF for llama.cpp.

Tensors are computed, written and dropped one after the other, so a model of any size needs the
memory of its largest tensor in the checkpoint's dtype and in the file's.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.adapted import AdaptedModel, open_adapted
from mlx_edgelora.export.folders import new_folder
from mlx_edgelora.export.fusing import merge
from mlx_edgelora.export.gguf_arch import Converter, gguf_library
from mlx_edgelora.export.gguf_vocab import write_vocabulary
from mlx_edgelora.model.checkpoint import LazyModel, drain
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.storage.device_memory import to_numpy
from mlx_edgelora.storage.files import sync
from mlx_edgelora.training.adapters import (
    WEIGHTS_FILE,
    check_adapter,
    model_for,
    read_adapter_config,
)

OUTTYPES = "f32", "f16", "bf16", "q8_0"
ADAPTER_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"
# Floats that are converted at once.
_CHUNK = 1 << 22

Specs = list[tuple[str, tuple[int, ...], str]]


def export_gguf(
    adapter: str | os.PathLike,
    save_path: str | os.PathLike,
    model: str | None = None,
    fused: bool = False,
    outtype: str | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write an adapter as GGUF, or its model with the adapter merged into it.

    Args:
        adapter: folder of an adapter in mlx-lm's format.
        save_path: a folder that does not exist yet.
        model: the base model, a folder or a Hub name; None for the one that the adapter names.
        fused: write the whole model.
        outtype: dtype of matrices, one of "f32", "f16", "bf16" and "q8_0"; None for f32 of an
            adapter and f16 of a model. Vectors, routers and rows that Q8_0 cannot divide are wider.
        notify: called with notes.

    Returns:
        The file, `adapter.gguf` or `model.gguf` in `save_path`.

    Raises:
        EdgeLoraError: the `gguf` library is missing, llama.cpp has no form for the adapter or the
            model, or a file cannot be written; `save_path` is not created.
    """
    with new_folder(save_path) as folder:
        if fused:
            name = MODEL_FILE
            write_model(folder / name, adapter, model, outtype or "f16", notify)
        else:
            name = ADAPTER_FILE
            write_adapter(folder / name, adapter, model, outtype or "f32", notify)
    return Path(save_path) / name


def write_adapter(
    file: Path,
    adapter: str | os.PathLike,
    model: str | None,
    outtype: str,
    notify: Callable[[str], None],
) -> LazyModel:
    """Write `adapter.gguf` and give back the model it belongs to."""
    adapted = open_adapted(adapter, model, notify)
    lazy = adapted.lazy
    converter = Converter(adapted.model_type, lazy.model.args, len(lazy.model.layers))
    gguf = gguf_library()
    writer = gguf.GGUFWriter(file, converter.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    parameters = adapted.config["lora_parameters"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, parameters["scale"] * parameters["rank"])
    arrays = list(_lora_tensors(adapted, converter))
    _write(writer, file, [(name, array.shape, outtype) for name, array in arrays], drain(arrays))
    return lazy


def _lora_tensors(adapted: AdaptedModel, converter: Converter) -> Iterator[tuple[str, mx.array]]:
    """The tensors of an adapter: A [rank, in] and B [out, rank], of experts a stack of each."""
    if adapted.config.get("fine_tune_type") == "dora":
        raise EdgeLoraError(
            f"{adapted.adapter}: is of type dora, which llama.cpp has no adapters of; write the "
            "whole model with --fused"
        )
    for name, layer in adapted.layers.items():
        weight = f"{name}.weight"
        theirs = converter.name(weight)
        a, b = layer.lora_a, layer.lora_b
        if isinstance(layer, LoRAEmbedding):
            if "lm_head" not in adapted.lazy.model:
                raise EdgeLoraError(
                    f"{adapted.adapter}: adapts {name}, which is the vocabulary head as well; "
                    "llama.cpp would adapt one of them; write the whole model with --fused"
                )
            b = b.T  # A stays [rows, rank]: llama.cpp takes rows of it
        elif not isinstance(layer, LoRASwitchLinear):
            a, b = a.T, converter.order(weight, b.T)
        yield f"{theirs}.lora_a", a
        yield f"{theirs}.lora_b", b


def write_model(
    file: Path,
    adapter: str | os.PathLike | None,
    model: str | None,
    outtype: str,
    notify: Callable[[str], None],
) -> LazyModel:
    """Write `model.gguf`: the base model, merged with the adapter if there is one.

    Returns:
        The model, without its parameters.
    """
    name = model
    if adapter is not None:
        adapter = Path(adapter)
        config = read_adapter_config(adapter)
        if note := check_adapter(adapter / WEIGHTS_FILE):
            notify(f"note: {note}")
        name = model_for(adapter, model, notify)
    lazy = open_model(name, streamed=False, quantize=None, cache=Path())
    arguments, blocks = lazy.model.args, len(lazy.model.layers)
    converter = Converter(lazy.config["model_type"], arguments, blocks)
    if adapter is not None:
        merge(lazy, [adapter], [config], None, dequantize=True)
    gguf = gguf_library()
    writer = gguf.GGUFWriter(file, converter.architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(name).name)
    converter.write_settings(writer)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_vocabulary(writer, lazy.source, lazy.vocabulary)
    arrays = [
        (converter.name(place), converter.convert(place, array))
        for place, array in tree_flatten(lazy.model.parameters())
    ]
    arrays += [(place, mx.array(array)) for place, array in converter.extra_tensors()]
    specs = [(place, array.shape, _kind(place, array.shape, outtype)) for place, array in arrays]
    lazy.raw.clear()
    lazy.model = None  # a reference to the arrays would keep their results in memory
    _write(writer, file, specs, drain(arrays))
    lazy.checkpoint.files.check()
    return lazy


def _kind(name: str, shape: tuple[int, ...], outtype: str) -> str:
    """The dtype of a tensor in a file of this type, as llama.cpp's own converter chooses it."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "f32"
    if outtype == "q8_0" and shape[-1] % 32:
        return "f16"
    return outtype


def _write(writer: Any, file: Path, specs: Specs, arrays: Iterator[mx.array]) -> None:
    """Write header and tensors; each is evaluated, converted, written and dropped."""
    gguf = gguf_library()
    for name, shape, kind in specs:
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        stored = gguf.quants.quant_shape_to_byte_shape(shape, quantization)
        size = int(np.prod(stored))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, quantization)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, _, kind), array in zip(specs, arrays, strict=True):
            writer.write_tensor_data(_encode(array, gguf.GGMLQuantizationType[kind.upper()]))
            del array
        writer.flush()
        sync(writer.fout[0].fileno())
    finally:
        if writer.fout is not None:
            writer.close()


def _encode(array: mx.array, kind: Any) -> np.ndarray:
    """The bytes of an array in a dtype of GGUF; rows are converted a few at a time."""
    gguf = gguf_library()
    array = mx.contiguous(array)
    mx.eval(array)
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty(gguf.quants.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        floats = rows[start : start + step].astype(mx.float32)
        mx.eval(floats)
        part = gguf.quants.quantize(to_numpy(floats), kind)
        out[start : start + step] = part.view(np.uint8).reshape(part.shape[0], -1)
    return out
