"""An mlx-lm model whose blocks are read from disk each time they are called.

The model stays mlx-lm's own, caches and sampling included: only calls of its blocks are
intercepted, which bind the weights of one block, compute it and let the weights go while the next
block is read. One pass over the file serves all rows of a batch, so many prompts at once cost
little more time than one.
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
from mlx_edgelora.model.checkpoint import LazyModel, error_text
from mlx_edgelora.model.head import ADAPTED, ROW_NAMES, frozen_matrix, replace_output
from mlx_edgelora.model.loading import AttachedWeights, attach, open_model
from mlx_edgelora.model.lora import freeze
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import ModelShape

# A tile of the vocabulary head that stays on disk.
TILE_BYTES = 40 << 20
# Tokens of a prompt that are computed at once, the most first.
PREFILL_STEPS = (2048, 512, 128, 32)
# mlx-lm's caches grow by so many tokens.
CACHE_STEP = 256
# Of what is computed for a token, beside the widest layers of an MLP, in hidden states.
STATES = 8


@dataclass(frozen=True)
class InferencePlan:
    """What stays in memory while a model generates.

    Attributes:
        streamed_blocks: so many first blocks are read from disk for every token; 0 for a model
            that mlx-lm can hold.
        head_streamed: whether the vocabulary head is read by tiles, too.
        prefill_step: tokens of a prompt that are computed at once.
        peak: expected bytes.
        read: bytes read for each token, of all prompts together.
    """

    streamed_blocks: int
    head_streamed: bool
    prefill_step: int
    peak: int
    read: int

    @property
    def is_resident(self) -> bool:
        """Whether everything is in memory."""
        return not self.streamed_blocks and not self.head_streamed

    def text(self, blocks: int) -> str:
        """One line about it."""
        if self.is_resident:
            return f"the whole model is in memory, expected peak {size(self.peak)}"
        head = " and the vocabulary head" if self.head_streamed else ""
        return (
            f"{self.streamed_blocks} of {blocks} blocks{head} are read from disk for each token "
            f"({size(self.read)}), expected peak {size(self.peak)}"
        )


def open_lazy(model: str, adapter: Path | None, cache: Path) -> LazyModel:
    """A model with its adapter, frozen, of whose weights nothing was read.

    Args:
        model: a folder or a Hub name.
        adapter: a folder as mlx-lm and this package write it.
        cache: where a model is rewritten whose tensors cannot be streamed.

    Raises:
        EdgeLoraError: the model cannot be opened, or the adapter does not fit it.
    """
    lazy = open_model(model, streamed=True, quantize=None, cache=cache)
    freeze(lazy.model)
    if adapter is not None:
        try:
            load_adapters(lazy.model, str(adapter))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise EdgeLoraError(
                f"{adapter}: does not fit the model in {lazy.source} ({error_text(error)}); name "
                "the model that it was trained on"
            ) from error
    lazy.model.eval()
    return lazy


def plan_inference(lazy: LazyModel, budget: int | str, rows: int, tokens: int) -> InferencePlan:
    """What to keep in memory: as many blocks as the budget has room for.

    A model whose blocks cannot be streamed is for mlx-lm, if it fits.

    Args:
        lazy: as `open_lazy` gives it.
        budget: bytes for MLX, or "min" for as few as possible.
        rows: prompts that are answered at once.
        tokens: of the longest prompt with its answer.

    Raises:
        EdgeLoraError: the budget is too small, or the model can only be held whole.
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
    fixed += 4 * rows * lazy.vocabulary * 4  # logits and what sampling makes of them

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
    """Of the matrix that makes the logits."""
    sizes = [
        sum(array.nbytes for name, array in module.items() if name in ROW_NAMES)
        for module in map(frozen_matrix, lazy.blocks.modules_outside())
        if "weight" in module and module["weight"].shape[0] == lazy.vocabulary
    ]
    return max(sizes, default=0)


@contextmanager
def streamed(lazy: LazyModel, plan: InferencePlan) -> Iterator[nn.Module]:
    """The model, ready to be called as mlx-lm calls it; weights come and go by `plan`.

    Whatever a call makes of a block's weights is computed before the block after the next is
    read into the same memory.
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
            # Caches hold what is made of the weights, too.
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
    """Read the vocabulary head, or let it be computed by tiles."""
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
    """What the layer makes of x [..., in] with some of its rows: [..., rows]."""
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
