"""Run an mlx-lm model whose blocks are read from disk at every call.

The model is mlx-lm's own, with its caches and sampling. Only calls of its blocks are intercepted:
the weights of one block are bound, the block is computed, and its weights are dropped while the
next block is read. One pass over the file serves all rows of a batch, so a batch of prompts takes
little more time than a single prompt.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_edgelora.blocks.block_list import array_slots, bind_arrays
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.head import ADAPTED, ROW_NAMES, frozen_matrix, replace_output
from mlx_edgelora.model.loading import AttachedWeights, attach, open_model
from mlx_edgelora.model.lora import explain_misfit, freeze
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import ModelShape
from mlx_edgelora.training.adapters import read_adapter_config

# Size of the tiles in which a vocabulary head is read from disk.
TILE_BYTES = 40 << 20
# Possible numbers of prompt tokens that are computed at once, largest first.
PREFILL_STEPS = (2048, 512, 128, 32)
# Number of tokens by which mlx-lm's caches grow.
CACHE_STEP = 256
# Activations of a token outside the MLP and attention, in units of hidden states.
STATES = 8


@dataclass(frozen=True)
class InferencePlan:
    """Memory plan of a model that generates.

    Attributes:
        streamed_blocks: number of first blocks that are read from disk for every token; 0 if the
            model fits into memory.
        head_streamed: whether the vocabulary head is read in tiles, too.
        prefill_step: number of prompt tokens that are computed at once.
        peak: expected peak in bytes.
        read: bytes read for each token of a batch of prompts.
    """

    streamed_blocks: int
    head_streamed: bool
    prefill_step: int
    peak: int
    read: int

    @property
    def is_resident(self) -> bool:
        """Whether the whole model is in memory."""
        return not self.streamed_blocks and not self.head_streamed

    def text(self, blocks: int) -> str:
        """One line about the plan, for a model with `blocks` blocks."""
        if self.is_resident:
            return f"the whole model is in memory, expected peak {size(self.peak)}"
        head = " and the vocabulary head" if self.head_streamed else ""
        return (
            f"{self.streamed_blocks} of {blocks} blocks{head} are read from disk for each token "
            f"({size(self.read)}), expected peak {size(self.peak)}"
        )


def open_lazy(model: str, adapter: Path | None, cache: Path) -> LazyModel:
    """Open a frozen model with its adapter, without reading weights.

    Args:
        model: a folder or a Hub name.
        adapter: folder of an adapter of mlx-lm or this package; None for the base model.
        cache: folder for the converted copy of a model whose files cannot be streamed.

    Raises:
        EdgeLoraError: the model cannot be opened, or the adapter does not fit it.
    """
    lazy = open_model(model, streamed=True, quantize=None, cache=cache)
    freeze(lazy.model)
    if adapter is not None:
        read_adapter_config(adapter)
        with explain_misfit(adapter, lazy.source):
            load_adapters(lazy.model, str(adapter))
    lazy.model.eval()
    return lazy


def plan_inference(lazy: LazyModel, budget: int | str, rows: int, tokens: int) -> InferencePlan:
    """Plan to keep the largest number of blocks in memory that fits the budget.

    A model whose blocks cannot be streamed is run by mlx-lm if it fits.

    Args:
        lazy: a model of `open_lazy`.
        budget: bytes for MLX, or "min" for the smallest possible peak.
        rows: number of prompts that are answered at once.
        tokens: tokens of the longest prompt and its answer together.

    Raises:
        EdgeLoraError: the budget is too small, or the model does not fit and cannot be streamed.
    """
    try:
        lazy.blocks = checked_blocks(lazy.model)
    except EdgeLoraError as error:
        weights = sum(array.nbytes for _, array in tree_flatten(lazy.model.parameters()))
        if budget == "min" or weights > budget:
            raise EdgeLoraError(
                f"{error}; so it cannot be read block by block, and needs more than {size(weights)}"
            ) from error
        return InferencePlan(0, False, PREFILL_STEPS[1], weights, 0)
    shape = shape_of(lazy.blocks, lazy.vocabulary)
    head = _head_bytes(lazy)
    blocks = len(lazy.blocks)
    fixed = shape.outside_bytes + shape.adapter_bytes * blocks + shape.outside_adapter_bytes
    cached = -(-tokens // CACHE_STEP) * CACHE_STEP
    fixed += rows * cached * shape.keys * blocks * shape.itemsize  # keys and values
    fixed += 4 * rows * lazy.vocabulary * 4  # logits and arrays of sampling

    def work(step: int, head_streamed: bool) -> int:
        of_head = min(2 * head, 3 * TILE_BYTES) if head_streamed else head
        return fixed + of_head + _activations(shape, rows * min(step, tokens))

    def plan(held: int, step: int, head_streamed: bool) -> InferencePlan:
        count = max(1, blocks - held)
        peak = work(step, head_streamed) + (blocks - count + 2) * shape.block_bytes
        read = count * shape.block_bytes + (head if head_streamed else 0)
        return InferencePlan(count, head_streamed, step, peak, read)

    least = plan(0, PREFILL_STEPS[-1], True)
    if budget == "min":
        return least
    whole = work(PREFILL_STEPS[0], False) + blocks * shape.block_bytes + shape.head_bytes - head
    if whole <= budget:
        return InferencePlan(0, False, PREFILL_STEPS[0], whole, 0)
    for head_streamed in (False, True):
        for step in PREFILL_STEPS:
            held = (budget - work(step, head_streamed)) // shape.block_bytes - 2
            if held >= 0:
                return plan(held, step, head_streamed)
    raise EdgeLoraError(
        f"memory_budget: got {size(budget)}, but this model with {rows} prompts at once and "
        f"{tokens} tokens needs {size(least.peak)}; raise it, or lower --max-tokens or --batch-size"
    )


def _activations(shape: ModelShape, tokens: int) -> int:
    widths = 3 * shape.intermediate + STATES * shape.hidden + 2 * (shape.queries + shape.keys)
    return tokens * widths * shape.itemsize


def _head_bytes(lazy: LazyModel) -> int:
    """Bytes of the matrix that computes the logits."""
    sizes = [
        sum(array.nbytes for name, array in module.items() if name in ROW_NAMES)
        for module in map(frozen_matrix, lazy.blocks.modules_outside())
        if "weight" in module and module["weight"].shape[0] == lazy.vocabulary
    ]
    return max(sizes, default=0)


@contextmanager
def streamed(lazy: LazyModel, plan: InferencePlan) -> Iterator[nn.Module]:
    """Make the model callable by mlx-lm; its weights are read according to `plan`.

    The results of a block are evaluated before another block is read into the same memory.

    Args:
        lazy: a model of `open_lazy`.
        plan: its plan.

    Yields:
        The model.
    """
    blocks, meter = lazy.blocks, DiskMeter()
    attached = attach(
        lazy,
        streamed=True,
        dtype=None,
        meter=meter,
        streamed_blocks=plan.streamed_blocks,
    )
    mx.eval([array for _, array in tree_flatten(lazy.model.trainable_parameters())])
    slots = [array_slots(block) for block in blocks.blocks]

    def visit(index: int, x: mx.array, args: tuple, kwargs: dict) -> Any:
        values = attached.weights.block(index)
        attached.weights.prefetch((index + 1) % len(slots))
        block = blocks.blocks[index]
        with bind_arrays(slots[index], values):
            result = block(x, *args, **kwargs)
            # Caches contain results of the weights, too.
            states = [value.state for value in (*args, *kwargs.values()) if _is_cache(value)]
            mx.eval(result, states)
        return result

    with ExitStack() as stack:
        stack.callback(attached.weights.close)
        _settle_head(attached, plan, stack)
        stack.enter_context(blocks.intercept(visit))
        yield lazy.model


def _is_cache(value: Any) -> bool:
    return hasattr(value, "state") and not isinstance(value, mx.array)


def _settle_head(attached: AttachedWeights, plan: InferencePlan, stack: ExitStack) -> None:
    """Read the vocabulary head into memory, or replace it by a computation in tiles."""
    head = attached.head
    if head is None or head.is_resident:
        return
    module, matrix = head.module, frozen_matrix(head.module)
    if not plan.head_streamed or isinstance(module, ADAPTED):
        for name, array in head.slice(0, head.vocabulary).items():
            matrix[name] = array
        return
    row = sum(array.nbytes for array in head.slice(0, 1).values())
    rows = max(1, TILE_BYTES // row)

    def logits(x: mx.array) -> mx.array:
        parts = []
        for start in range(0, head.vocabulary, rows):
            tile = head.slice(start, min(start + rows, head.vocabulary))
            parts.append(_product(x, tile, matrix))
            mx.eval(parts[-1])
            del tile
        return mx.concatenate(parts, axis=-1)

    stack.enter_context(replace_output(module, logits))


def _product(x: mx.array, tile: dict[str, mx.array], matrix: nn.Module) -> mx.array:
    """The output of a layer for x [..., in], restricted to the rows of a tile: [..., rows]."""
    if "scales" in tile:
        y = mx.quantized_matmul(
            x,
            tile["weight"],
            scales=tile["scales"],
            biases=tile.get("biases"),
            transpose=True,
            group_size=matrix.group_size,
            bits=matrix.bits,
            mode=matrix.mode,
        )
    else:
        y = x @ tile["weight"].T
    return y + tile["bias"] if "bias" in tile else y
