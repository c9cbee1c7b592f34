"""Full fine-tuning: the last blocks' own weights are trained, as `mlx_lm.lora` does."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import array_slots
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.lora import check_num_layers, freeze
from mlx_edgelora.model.weights import TensorLocation, cast
from mlx_edgelora.storage.safetensors import read_header


def unfreeze_blocks(model: nn.Module, num_layers: int) -> None:
    """Train all weights of the last blocks, and nothing else; as in mlx-lm.

    Embeddings, the head and the norm after the blocks stay frozen.

    Args:
        model: an mlx-lm model; changed in place.
        num_layers: number of last blocks; -1 for all.

    Raises:
        EdgeLoraError: too many blocks, or a block with quantized weights.
    """
    count = check_num_layers(model, num_layers)
    freeze(model)
    blocks = model.layers[len(model.layers) - count :]
    for index, block in enumerate(blocks, start=len(model.layers) - count):
        _check_unquantized(index, block)
        block.unfreeze()
        for name, value in tree_flatten(block.trainable_parameters()):
            if not mx.issubdtype(value.dtype, mx.floating):
                raise EdgeLoraError(
                    f"fine_tune_type: full cannot train {name} of block {index}, which has dtype "
                    f"{value.dtype}; use fine_tune_type lora"
                )


def _check_unquantized(index: int, block: nn.Module) -> None:
    """Check that a block has no packed weights, whose gradient does not exist."""
    for name, module in block.named_modules():
        if "scales" in module:
            raise EdgeLoraError(
                f"fine_tune_type: full cannot train {name} of block {index}, which is quantized "
                f"to {module.bits} bits; name an unquantized model, or use fine_tune_type lora"
            )


def take_out(lazy: LazyModel, dtype: mx.Dtype | None) -> None:
    """Let the trained weights of a model belong to the run, and not to its checkpoint.

    They are then not read from it again with the frozen weights, and nothing but the model holds
    them. Nothing is read here.

    Args:
        lazy: a model whose blocks are trained.
        dtype: dtype to cast them to; None leaves them.
    """
    slots = array_slots(lazy.model)
    for name, value in tree_flatten(lazy.model.trainable_parameters()):
        lazy.raw.pop(id(value), None)
        box, key = slots[name]
        box[key] = value if dtype is None else cast(value, dtype)


def stream_from(lazy: LazyModel, file: Path) -> None:
    """Let weights that a model has from a file be streamed like those of its checkpoint.

    Args:
        lazy: a model with the weights of a full fine-tuning, not evaluated yet.
        file: the file that they are in.
    """
    slots = array_slots(lazy.model)
    lazy.checkpoint.files.watch(file)
    for name, info in read_header(file).items():
        box, key = slots[name]
        place = f"{file}:{name}"  # no name of the checkpoint's own
        lazy.checkpoint.tensors[place] = file, info
        lazy.raw[id(box[key])] = box[key], TensorLocation(file, place)
