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

from mlx_edgelora.blocks.block_list import BlockList, bind_arrays
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.engine.block_weights import BlockWeights
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.full import stream_from
from mlx_edgelora.model.head import (
    ROW_NAMES,
    ModelHead,
    frozen_matrix,
    replace_output,
)
from mlx_edgelora.model.loading import attach, open_model
from mlx_edgelora.model.lora import explain_misfit, freeze, replace_dora
from mlx_edgelora.model.weights import ResidentWeights
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import ModelShape
from mlx_edgelora.training.adapters import WEIGHTS_FILE, read_adapter_config

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
        config = read_adapter_config(adapter)
        with explain_misfit(adapter, lazy.source):
            load_adapters(lazy.model, str(adapter))
        replace_dora(lazy.model)
        if config.get("fine_tune_type") == "full":
            stream_from(lazy, adapter / WEIGHTS_FILE)
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

    def work(step: int, head_streamed: bool) -> int:
        of_head = min(2 * head, 3 * TILE_BYTES) if head_streamed else head
        return fixed + of_head + working_bytes(shape, rows, tokens, step)

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


def working_bytes(shape: ModelShape, rows: int, tokens: int, step: int) -> int:
    """Bytes of caches and activations while prompts are answered, without the weights.

    Args:
        shape: sizes of the model.
        rows: number of prompts that are answered at once.
        tokens: tokens of the longest prompt and its answer together.
        step: number of prompt tokens that are computed at once.
    """
    cached = -(-tokens // CACHE_STEP) * CACHE_STEP
    # While a finished row is taken out of a batch, mlx-lm holds the caches of before and after.
    caches = (2 * rows - 1) * cached * shape.keys * shape.blocks * shape.itemsize
    logits = 4 * rows * shape.vocabulary * 4  # and arrays of sampling
    widths = 3 * shape.intermediate + STATES * shape.hidden + 2 * (shape.queries + shape.keys)
    return caches + logits + rows * min(step, tokens) * widths * shape.itemsize


def _head_bytes(lazy: LazyModel) -> int:
    """Bytes of the matrix that computes the logits."""
    sizes = [
        sum(array.nbytes for name, array in module.items() if name in ROW_NAMES)
        for module in map(frozen_matrix, lazy.blocks.modules_outside())
        if "weight" in module and module["weight"].shape[0] == lazy.vocabulary
    ]
    return max(sizes, default=0)


class StreamedModel:
    """A model that is called like mlx-lm's; the arrays of a block are bound while it is computed.

    Results of a block are evaluated before another block is read into the same memory. Attributes
    are those of the model, so that mlx-lm's functions accept it.

    Args:
        blocks: the model's blocks.
        weights: source of frozen weights of the blocks.
        adapters: source of trained parameters of the blocks.
        head: the vocabulary head; read in tiles if it is not in memory. None if it cannot be.
        tile_bytes: size of such a tile.
        cache_limit: bytes of freed buffers that MLX may keep during a call; None for no change.
        prefill_step: number of prompt tokens to compute at once.
    """

    def __init__(
        self,
        blocks: BlockList,
        weights: WeightSource,
        adapters: WeightSource,
        head: ModelHead | None,
        tile_bytes: int = TILE_BYTES,
        cache_limit: int | None = None,
        prefill_step: int = PREFILL_STEPS[0],
    ) -> None:
        self._model, self._blocks, self._weights = blocks.model, blocks, weights
        self._arrays = BlockWeights(blocks, weights, adapters)
        self._head = None if head is None or head.is_resident else head
        self._tile_bytes, self._cache_limit = tile_bytes, cache_limit
        self._last_only = False
        self.prefill_step = prefill_step

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """The model's output for the arguments of its class; logits are [rows, tokens, words]."""
        with ExitStack() as stack:
            if self._cache_limit is not None:
                stack.callback(mx.set_cache_limit, mx.set_cache_limit(self._cache_limit))
            if self._head is not None:
                matrix = frozen_matrix(self._head.module)
                stack.enter_context(replace_output(matrix, self._logits))
            stack.enter_context(self._blocks.intercept(self._visit))
            return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Compute the logits of the last token only; mlx-lm uses no others when it generates."""
        self._last_only = True
        try:
            yield
        finally:
            self._last_only = False

    def close(self) -> None:
        """Free the weights of the blocks and close their files."""
        self._weights.close()

    def _visit(self, index: int, x: mx.array, args: tuple, kwargs: dict) -> Any:
        following = (index + 1) % len(self._blocks)
        trained, frozen = self._arrays.load(index, following)
        with bind_arrays(self._arrays.slots[index], frozen | trained):
            result = self._blocks.function(index)(x, *args, **kwargs)
            # Caches contain results of the weights, too.
            states = [value.state for value in (*args, *kwargs.values()) if _is_cache(value)]
            mx.eval(result, states)
        return result

    def _logits(self, x: mx.array) -> mx.array:
        """Logits for x [..., tokens, width], from a tile of the head after the other."""
        shape, matrix = x.shape, frozen_matrix(self._head.module)
        if self._last_only:
            x = x[..., -1:, :]
        row = sum(array.nbytes for array in self._head.slice(0, 1).values())
        rows = max(1, self._tile_bytes // row)
        parts = []
        for start in range(0, self._head.vocabulary, rows):
            tile = self._head.slice(start, min(start + rows, self._head.vocabulary))
            parts.append(_product(x, tile, matrix))
            mx.eval(parts[-1])
            del tile
        logits = mx.concatenate(parts, axis=-1)
        return mx.broadcast_to(logits, (*shape[:-1], logits.shape[-1]))


def streamed(lazy: LazyModel, plan: InferencePlan) -> StreamedModel:
    """Make the model callable by mlx-lm; its weights are read according to `plan`.

    Args:
        lazy: a model of `open_lazy`.
        plan: its plan.

    Returns:
        The model; close it.
    """
    attached = attach(
        lazy,
        streamed=True,
        dtype=None,
        meter=DiskMeter(),
        streamed_blocks=plan.streamed_blocks,
    )
    mx.eval([array for _, array in tree_flatten(lazy.model.trainable_parameters())])
    head = attached.head
    if head is not None and not head.is_resident and not plan.head_streamed:
        matrix = frozen_matrix(head.module)
        for name, array in head.slice(0, head.vocabulary).items():
            matrix[name] = array
        head = None
    # The cache of freed buffers would outgrow a small budget.
    cache_limit = max(16 << 20, plan.peak // 16)
    return StreamedModel(
        lazy.blocks,
        attached.weights,
        ResidentWeights(),
        head,
        cache_limit=cache_limit,
        prefill_step=plan.prefill_step,
    )


def _is_cache(value: Any) -> bool:
    return hasattr(value, "state") and not isinstance(value, mx.array)


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
