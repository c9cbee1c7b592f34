"""Find the sizes of a model that decide the cost of a step, without reading its weights."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_edgelora.blocks.added_scores import factors_of, remembered_factors
from mlx_edgelora.blocks.block_list import BlockList, intercept_calls
from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.experts import count_experts
from mlx_edgelora.blocks.gated_mlp import find_gated_mlp, needs_no_whole_matrix
from mlx_edgelora.blocks.masks import tiled_mask
from mlx_edgelora.blocks.outputs import Linked, leaves_of
from mlx_edgelora.blocks.parts import AttentionInputs, BlockParts, TokenSpan
from mlx_edgelora.blocks.states import (
    Recurrence,
    RecurrentParts,
    attends,
    find_recurrences,
    states_in,
)
from mlx_edgelora.blocks.tiling import TRIAL_SHAPE, block_calls
from mlx_edgelora.blocks.trained import trains_weights
from mlx_edgelora.layers.fused import Backend, use_fused
from mlx_edgelora.model.head import MATRICES, find_head, frozen_matrix
from mlx_edgelora.model.weights import cast, cast_all
from mlx_edgelora.planner.sizes import BlockBytes, ModelShape

# Tokens of a row that is long enough for MLX's fused attention.
LONG = 1024


def shape_of(blocks: BlockList, vocabulary: int, dtype: mx.Dtype | None = None) -> ModelShape:
    """Find the sizes of an adapted model; nothing is evaluated.

    Args:
        blocks: checked blocks of a model with adapters (`add_lora`).
        vocabulary: number of logits of a token.
        dtype: dtype to which floating weights will be cast; None keeps theirs.
    """
    model = blocks.model
    trained = {name: value.nbytes for name, value in tree_flatten(model.trainable_parameters())}
    recurrences = find_recurrences(blocks)
    attention = _attention(blocks, recurrences)
    by_block = [_BlockSizes(block, dtype) for block in blocks.blocks]
    states = _state_bytes(blocks, recurrences)
    largest = max(by_block, key=lambda block: block.frozen + block.trained)
    every_block = tuple(b.bytes for b in by_block)
    adapted = [index for index, block in enumerate(by_block) if block.trained]
    outside = {n: v for n, v in trained.items() if blocks.local(n) is None}
    entry = any("embed" in name for name in outside)  # its backward passes through all blocks
    hidden = block_calls(blocks)[0][0].shape[2]
    head = find_head(blocks)
    matrix = None if head is None else frozen_matrix(head)
    modules = [m for m in blocks.modules_outside() if isinstance(m, MATRICES)]
    sizes = {id(m): _frozen_bytes(m, dtype) for m in modules}
    frozen = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if blocks.local(name) is None and name not in trained
    }
    every = sum((v if dtype is None else cast(v, dtype)).nbytes for v in frozen.values())
    outside_bytes = every - sum(sizes.values())
    largest_block = max(block.frozen for block in by_block)
    return ModelShape(
        blocks=len(blocks),
        adapted=len(blocks) if entry else len(blocks) - min(adapted, default=len(blocks)),
        hidden=hidden,
        queries=attention.queries,
        keys=attention.keys,
        intermediate=largest.intermediate,
        vocabulary=vocabulary,
        rank=largest.rank,
        block_bytes=largest_block,
        mlp_bytes=largest.mlp_frozen,
        block_weights=largest.entries,
        mlp_weights=largest.mlp_entries,
        head_bytes=sum(sizes.values()),
        head_entries=vocabulary * hidden,
        packed=largest.packed,
        head_packed=matrix is not None and "scales" in matrix,
        outside_bytes=max(0, outside_bytes),
        adapter_bytes=max(block.trained for block in by_block),
        mlp_adapter_bytes=largest.mlp_trained,
        outside_adapter_bytes=sum(outside.values()),
        itemsize=(dtype or blocks.hidden_dtype).size,
        gated=all(block.gated for block in by_block),
        blocked_heads=attention.blocked_heads,
        arguments=_argument_entries(blocks),
        shared=sum(form.read_entries for form in blocks.forms if form),
        expert_bytes=largest.expert_frozen,
        one_expert_bytes=largest.one_expert,
        full=trains_weights(model),
        row_bytes=largest_block - max(block.frozen - block.by_rows for block in by_block),
        expert_adapter_bytes=largest.expert_trained,
        state_bytes=max(states, default=0),
        by_block=every_block if len(set(every_block)) > 1 else (),
        recurrent_attends=any(_has_both(recurrence) for recurrence in recurrences),
        routed=_routed_entries(blocks, by_block.index(largest)) if largest.one_expert else 0,
        expanded=attention.expanded,
        recurrent=max([b.widest for b, n in zip(by_block, states, strict=True) if n], default=0),
    )


Recurrences = list[Recurrence | None]


def _has_both(recurrence: Recurrence | None) -> bool:
    """Whether a block has states, and keys and values."""
    if recurrence is None:
        return False
    return bool(states_in(recurrence.layout)) and attends(recurrence.layout)


def _state_bytes(blocks: BlockList, recurrences: Recurrences) -> list[int]:
    """For each block, bytes of the states that tiles of a row hand on; 0 if there are none."""
    found, span = [], TokenSpan(0, TRIAL_SHAPE[1])
    for index, (x, args, kwargs) in enumerate(block_calls(blocks)):
        recurrence, states = recurrences[index], []
        if recurrence is not None and states_in(recurrence.layout):
            form = blocks.forms[index]
            parts = RecurrentParts(blocks.function(index), args, kwargs, form, recurrence)
            with suppress(*MODEL_ERRORS):  # `blocks/tiling.py` says why it is not tiled
                none = parts.no_states
                own = parts.tile_key_values(x, span, none) if parts.attends else ()
                states = parts.tile_outputs(x, span, none, span, own)[1]
        found.append(sum(state.nbytes for state in states) // x.shape[0])
    return found


def _argument_entries(blocks: BlockList) -> int:
    """Entries of a token in the arrays [B, T, ...] that blocks are called with."""
    found = {}
    for x, args, kwargs in block_calls(blocks):
        for _, leaf in leaves_of([args, kwargs]):
            own = isinstance(leaf, mx.array) and not isinstance(leaf, Linked) and leaf.ndim > 2
            if own and leaf.shape[:2] == x.shape[:2]:
                found[id(leaf)] = leaf, math.prod(leaf.shape[2:])
    return sum(entries for _, entries in found.values())


def _routed_entries(blocks: BlockList, index: int) -> int:
    """Outputs of the matrices of experts of a token in one block; 0 if it cannot be called."""
    kinds = SwitchLinear, QuantizedSwitchLinear
    layers = [m for m in blocks.blocks[index].modules() if isinstance(m, kinds)]
    sizes = []

    def measure(number: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        found = layers[number](x, *args, **kwargs)
        sizes.append(found.size)
        return found

    x, args, kwargs = block_calls(blocks)[index]
    with intercept_calls(layers, measure), suppress(*MODEL_ERRORS):
        blocks.function(index)(x, *args, **kwargs)
    return sum(sizes) // (x.shape[0] * x.shape[1])


class _Attention(NamedTuple):
    """Sizes of attention, each of the block with the most; see `ModelShape`."""

    queries: int = 0
    keys: int = 0
    expanded: int = 0
    blocked_heads: int = 0


def _attention(blocks: BlockList, recurrences: Recurrences) -> _Attention:
    """Sizes of attention, from the calls that the code of the blocks makes."""
    found, backend = _Attention(), Backend.here()
    calls = zip(block_calls(blocks), recurrences, strict=True)
    for index, ((x, args, kwargs), recurrence) in enumerate(calls):
        try:
            # What a block returns can be unknown, and then nothing is called for parts.
            block = blocks.function(index)
            parts = BlockParts(block, args, kwargs)
            if _has_both(recurrence):
                parts = RecurrentParts(block, args, kwargs, recurrence=recurrence)
            with remembered_factors():
                inputs = parts.attention_inputs(x, TokenSpan(0, x.shape[1]))
        except MODEL_ERRORS:
            continue  # the block has another form of attention
        own, *held = [a.shape[1] * a.shape[3] for a in (inputs.q, inputs.k, inputs.v)]
        expanded = 0
        if (factors := factors_of(inputs.mask, inputs.q, inputs.k)) is not None:
            # Keys and values of heads are made again from what the block gives its cache.
            own += factors.queries.shape[1] * factors.queries.shape[3]
            cut = BlockParts(block, args, kwargs, through_cache=True)
            held, expanded = _entries(cut, x) or held, sum(held)
        heads = 0
        if backend.name == "metal" and _is_blocked(inputs, backend):
            heads = inputs.q.shape[1]
        found = _Attention(*map(max, found, (own, sum(held), expanded, heads)))
    return found


def _entries(parts: BlockParts, x: mx.array) -> list[int]:
    """Entries of a token in what a block gives its cache; none if it has several."""
    with suppress(*MODEL_ERRORS):
        return [a.shape[1] * a.shape[3] for a in parts.key_values(x, TokenSpan(0, x.shape[1]))]
    return []


def _is_blocked(inputs: AttentionInputs, backend: Backend) -> bool:
    """Whether MLX's fused gradient of attention is used for long rows."""
    mask = tiled_mask(inputs.mask, inputs.q.shape[2], inputs.k.shape[2])
    # These arrays are never evaluated.
    arrays = [mx.zeros((*a.shape[:2], LONG, a.shape[3]), a.dtype) for a in inputs[:3]]
    return use_fused(*arrays, traced=True, mask=mask, sinks=inputs.sinks, backend=backend)[0]


class _BlockSizes:
    """Sizes of one block."""

    def __init__(self, block: nn.Module, dtype: mx.Dtype | None) -> None:
        trained = dict(tree_flatten(block.trainable_parameters()))
        arrays = {n: v for n, v in tree_flatten(block.parameters()) if n not in trained}
        held = _held(arrays, dtype)
        forms = [(path, module, find_gated_mlp(module)) for path, module in block.named_modules()]
        mlps = [
            (f"{path}.", module, form)
            for path, module, form in forms
            if form and not trains_weights(module)
        ]
        counts = {
            f"{path}.": layers
            for path, module in block.named_modules()
            if (layers := count_experts(module)) and not trains_weights(module)
        }
        by_experts = {
            path: sum(size for name, size in held.items() if name.startswith(path))
            for path in counts
        }
        self.expert_frozen = sum(by_experts.values())
        self.one_expert = max((by_experts[path] // counts[path] for path in counts), default=0)
        self.expert_trained = sum(
            value.nbytes for name, value in trained.items() if name.startswith(tuple(counts))
        )
        self.gated = bool(mlps) or bool(counts)
        matrices = {
            f"{path}.": frozen_matrix(module)
            for path, module in block.named_modules()
            if isinstance(frozen_matrix(module), MATRICES) and not path.endswith(".linear")
        }
        sizes = {path: _dims(matrix) for path, matrix in matrices.items()}
        inside = [path for path in sizes if any(path.startswith(mlp) for mlp, _, _ in mlps)]

        def in_mlp(name: str) -> bool:
            return any(name.startswith(path) for path, _, _ in mlps)

        self.frozen = sum(held.values())
        self.mlp_frozen = sum(size for name, size in held.items() if in_mlp(name))
        by_rows = len(mlps) == 1 and not counts and needs_no_whole_matrix(mlps[0][1])
        self.by_rows = self.mlp_frozen if by_rows else 0
        self.trained = sum(value.nbytes for value in trained.values())
        self.mlp_trained = sum(v.nbytes for name, v in trained.items() if in_mlp(name))
        self.entries = sum(a * b for a, b in sizes.values())
        self.mlp_entries = sum(sizes[path][0] * sizes[path][1] for path in inside)
        self.widest = max(
            (out for path, (_, out) in sizes.items() if path not in inside), default=0
        )
        outs = [out for path, (_, out) in sizes.items() if path not in inside]
        self.intermediate = max((sizes[path][1] for path in inside), default=max(outs, default=1))
        # [in, rank], or [experts, rank, in].
        self.rank = max((v.shape[1] for n, v in trained.items() if n.endswith("lora_a")), default=0)
        self.packed = any("scales" in matrix for matrix in matrices.values())

    @property
    def bytes(self) -> BlockBytes:
        return BlockBytes(self.frozen, self.expert_frozen, self.trained)


def _dims(matrix: nn.Module) -> tuple[int, int]:
    """Number of inputs and of outputs of a matrix, packed or not."""
    rows, columns = matrix["weight"].shape[-2:]
    return (columns * 32 // matrix.bits if "scales" in matrix else columns), rows


def _held(arrays: Mapping[str, mx.array], dtype: mx.Dtype | None) -> dict[str, int]:
    """Bytes of each array in memory, after a cast to `dtype`."""
    kept = arrays if dtype is None else cast_all(dict(arrays), dtype)
    return {name: value.nbytes for name, value in kept.items()}


def _frozen_bytes(module: nn.Module, dtype: mx.Dtype | None) -> int:
    """Bytes of an embedding or a head in memory; its scales are cast as well."""
    own = [value for value in module.values() if isinstance(value, mx.array)]
    return sum((value if dtype is None else cast(value, dtype)).nbytes for value in own)
