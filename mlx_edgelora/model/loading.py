"""Open a model lazily by its name, and attach its weights after adapters were added."""

import dataclasses
import os
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import BlockList, array_slots
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.linear import DequantizedEmbedding
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.model.checkpoint import (
    LazyModel,
    convert_checkpoint,
    load_lazily,
    read_checkpoint,
    resolve_model,
)
from mlx_edgelora.model.head import (
    EMBEDDINGS,
    ROW_NAMES,
    ModelHead,
    ResidentRows,
    StreamedRows,
    cast_lookups,
    check_rows,
    find_head,
    frozen_matrix,
    stream_embedding,
)
from mlx_edgelora.model.weights import ResidentWeights, StreamedWeights, cast, cast_all
from mlx_edgelora.storage.safetensors import RowReader, TensorInfo
from mlx_edgelora.storage.temporaries import mark_used

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def open_model(name: str, *, streamed: bool, quantize: int | None, cache: Path) -> LazyModel:
    """Open a model without reading its weights.

    Args:
        name: a folder or a Hub name.
        streamed: whether weights will be read block by block. A checkpoint is then rewritten once
            if mlx-lm computes parameters from the stored tensors.
        quantize: bits to quantize an unquantized checkpoint to, once; None for none.
        cache: folder of rewritten checkpoints.

    Raises:
        EdgeLoraError: the model cannot be found, read, built or rewritten.
    """
    lazy = load_lazily(read_checkpoint(resolve_model(name)))
    if quantize is not None and "quantization" in lazy.config:
        raise EdgeLoraError(
            f"quantize: got {quantize} bits, but {name} is already quantized; leave --quantize "
            "out, or name an unquantized model"
        )
    if quantize is None and (not streamed or can_stream(lazy)):
        return lazy
    folder = convert_checkpoint(lazy, cache, quantize)
    used = mark_used(folder)
    rewritten = load_lazily(read_checkpoint(folder))
    weakref.finalize(rewritten.checkpoint, os.close, used)
    return dataclasses.replace(rewritten, source=lazy.source)


def can_stream(lazy: LazyModel) -> bool:
    """Whether every parameter is stored in a shard as the model uses it; call before `add_lora`."""
    return all(lazy.location(array) for _, array in tree_flatten(lazy.model.parameters()))


@dataclass
class AttachedWeights:
    """The sources of a model's frozen weights.

    Attributes:
        blocks: the model's blocks, checked.
        weights: weights of the blocks.
        head: the vocabulary head, read by rows; None if only whole rows of logits are possible.
        logits: description of how logits are computed.
    """

    blocks: BlockList
    weights: WeightSource
    head: ModelHead | None
    logits: str


def attach(
    lazy: LazyModel,
    *,
    streamed: bool,
    dtype: str | None,
    meter: DiskMeter,
    streamed_blocks: int | None = None,
    head_streamed: bool = True,
    file_cache: int | None = None,
) -> AttachedWeights:
    """Choose the source of every frozen weight; call it after `add_lora`.

    Resident: all weights are read and cast now. Streamed: blocks, token embedding and head stay on
    disk, and the other weights (norms) are read now. If the head cannot be read by rows, all
    weights outside the blocks are read, and the loss works on whole rows of logits. Trained
    parameters are not changed.

    Args:
        lazy: the adapted model.
        streamed: whether weights are read when they are needed, or all of them now.
        dtype: dtype to cast floating weights to; None leaves them.
        meter: counts the bytes read.
        streamed_blocks: number of first blocks to stream; None for all.
        head_streamed: whether embedding and head stay on disk, too.
        file_cache: bytes of files that the system can cache; None if unknown. Larger streamed
            blocks are read past the cache, because it would drop each of them before its next use,
            and the files of other programs with them.

    Raises:
        EdgeLoraError: the architecture cannot be walked, or a file cannot be read.
    """
    kind = DTYPES[dtype] if dtype else None
    blocks = lazy.blocks or checked_blocks(lazy.model)
    trained = [name for name, _ in tree_flatten(lazy.model.trainable_parameters())]
    on_disk: dict[int, StreamedRows] = {}
    head, why = _usable_head(blocks, trained)
    if streamed and head_streamed and head is not None:
        on_disk = _leave_on_disk(lazy, blocks, frozen_matrix(head), kind, meter)
    names = [
        name
        for name, _ in tree_flatten(lazy.model.parameters())
        if name not in trained and not (streamed and blocks.local(name))
    ]
    _read(blocks, names, on_disk, kind)
    lazy.checkpoint.files.check()  # arrays were lazy until here
    if kind is not None:
        cast_lookups(blocks.modules_outside(), kind)
    source: WeightSource = ResidentWeights()
    if streamed:
        places, files = _block_places(lazy, blocks), lazy.checkpoint.files
        source = StreamedWeights(places, kind, meter, files, streamed_blocks, file_cache)
    if head is None:
        check_rows(blocks, partial(_logits, blocks))
        return AttachedWeights(blocks, source, None, f"whole rows of logits: {why}")
    matrix = frozen_matrix(head)
    result = ModelHead(blocks, head, on_disk.get(id(matrix)) or ResidentRows(matrix))
    result.check_rows()
    if not result.is_separable():
        return AttachedWeights(
            blocks, source, None, "whole rows of logits: a logit depends on others"
        )
    where = "disk" if id(matrix) in on_disk else "memory"
    return AttachedWeights(blocks, source, result, f"vocabulary tiles of the head, from {where}")


def _logits(blocks: BlockList, hidden: mx.array, tokens: mx.array) -> mx.array:
    """The model's logits [n, vocabulary] for last hidden states [n, width]."""
    with blocks.skip_blocks(hidden[None]):
        return blocks.model(tokens[None])[0]


def _usable_head(blocks: BlockList, trained: list[str]) -> tuple[nn.Module | None, str]:
    """The head, if it can be used by rows, or None and the reason."""
    head = find_head(blocks)
    if head is None:
        return None, "no module makes the logits alone"
    if any("dropout" in m and m.dropout._p_1 != 1 for m in blocks.modules_outside()):
        return None, "an adapter outside the blocks has dropout"
    # Adapters of embeddings are before the blocks; all others may be after them.
    harmless = [m for m in blocks.modules_outside() if m is head or isinstance(m, EMBEDDINGS)]
    owned = {id(value) for m in harmless for _, value in tree_flatten(m.trainable_parameters())}
    slots = array_slots(blocks.model)
    for name in trained:
        container, key = slots[name]
        if not blocks.local(name) and id(container[key]) not in owned:
            return None, f"{name} is trained outside the blocks"
    return head, ""


def _leave_on_disk(
    lazy: LazyModel,
    blocks: BlockList,
    matrix: nn.Module,
    dtype: mx.Dtype | None,
    meter: DiskMeter,
) -> dict[int, StreamedRows]:
    """Let embeddings and head read their rows from disk; returns the readers by module id."""
    result = {}
    for module in blocks.modules_outside():
        embeds = type(module) in (nn.Embedding, nn.QuantizedEmbedding, DequantizedEmbedding)
        if not (embeds or module is matrix):
            continue
        places = {n: lazy.location(module[n]) for n in ROW_NAMES if module.get(n) is not None}
        readers = {
            name: RowReader(
                place.shard, lazy.checkpoint.tensors[place.name][1], lazy.checkpoint.files
            )
            for name, place in places.items()
        }
        result[id(module)] = StreamedRows(readers, dtype, meter)
        if embeds:
            stream_embedding(module, result[id(module)])
    return result


def _read(
    blocks: BlockList, names: list[str], on_disk: dict[int, StreamedRows], dtype: mx.Dtype | None
) -> None:
    """Evaluate parameters one by one, so that a cast costs one tensor and not the model."""
    slots = array_slots(blocks.model)
    wanted = {name: slots[name] for name in names if id(slots[name][0]) not in on_disk}
    if dtype is not None:
        arrays = cast_parameters(
            {name: box[key] for name, (box, key) in wanted.items()}, blocks, dtype
        )
        for name, (box, key) in wanted.items():
            box[key] = arrays.pop(name)
    for box, key in wanted.values():
        mx.eval(box[key])


def cast_parameters(
    arrays: dict[str, mx.array], blocks: BlockList, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Cast parameters by their names in the model.

    Scales of packed blocks stay as narrow as they are; those of an embedding decide the dtype of
    its rows and are cast.
    """
    inside = {name: array for name, array in arrays.items() if blocks.local(name)}
    outside = {name: cast(array, dtype) for name, array in arrays.items() if name not in inside}
    return cast_all(inside, dtype) | outside


def _block_places(lazy: LazyModel, blocks: BlockList) -> list[dict[str, tuple[Path, TensorInfo]]]:
    return [
        {
            name: lazy.checkpoint.tensors[place.name]
            for name, (box, key) in array_slots(block).items()
            if (place := lazy.location(box[key]))
        }
        for block in blocks.blocks
    ]
