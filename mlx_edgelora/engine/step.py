"""One training step's loss and gradients: the walk over blocks and the masked, tiled loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.experts import set_groups
from mlx_edgelora.blocks.gated_mlp import set_slices
from mlx_edgelora.blocks.packing import Packing
from mlx_edgelora.data import Batch
from mlx_edgelora.data.batches import PAD_TO
from mlx_edgelora.engine.adapter_state import AdapterState, ResidentAdapterState
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.gradients import add_into, gradient_tree
from mlx_edgelora.engine.walk import Pass, Walk
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.fused import set_attention_block
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy
from mlx_edgelora.losses.chunked import chunked_cross_entropy, in_graph
from mlx_edgelora.losses.exact import CrossEntropy, check_labels
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.measure.profile import phase
from mlx_edgelora.model.head import ModelHead
from mlx_edgelora.model.lora import without_adapter
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.planner.plan import Plan

Loss = CrossEntropy | ApproximateCrossEntropy

# Float32 logits of a chunk of tokens, if all logits of a token are computed at once.
LOGITS_BYTES = 4 * 2**20
# Number of different counts of labelled tokens for batches of one size: each one is compiled.
FILLED = 8


class Engine:
    """Computes losses and gradients of batches within a memory plan.

    Tokens without a label never reach the final norm and the head, so a masked prompt costs no
    logits. If possible the last block, too, computes only keys and values for them.

    Args:
        model: the adapted model.
        walk: the walk over its blocks.
        head: its head, read by tiles; None computes whole rows of logits.
        disk: counts the bytes that weights and store read and write.
        training_loss: the exact cross-entropy by default. Evaluation is always exact, and so is
            training if `head` is None.
        adapters: state of the adapters, also the walk's source of them; by default in the model.

    Attributes:
        plan_for: returns the plan for a batch; by default that of the last `set_plan`.
        empties_cache: whether MLX's buffer cache is emptied after every step, unless
            `clear_cache_threshold` is set.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        head: ModelHead | None,
        disk: DiskMeter,
        training_loss: Loss | None = None,
        adapters: AdapterState | None = None,
    ) -> None:
        self.model, self.disk = model, disk
        self.adapters = ResidentAdapterState(model) if adapters is None else adapters
        self._walk, self.head = walk, head
        # Evaluation uses tiles of the same size.
        tiles = getattr(training_loss, "exact", training_loss) or CrossEntropy()
        self._exact = CrossEntropy(tiles.tile_bytes)
        self.training_loss = training_loss or self._exact
        self._plan = Plan()
        self.plan_for: Callable[[Batch], Plan] = lambda batch: self._plan
        self.empties_cache = True

    @property
    def walk(self) -> Walk:
        """The walk over the model's blocks."""
        return self._walk

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self._plan

    def set_plan(self, plan: Plan) -> None:
        """Follow another plan from now on; weights stay where they are."""
        self._plan = plan
        set_attention_block(plan.attention_block)
        blocks = self._walk.blocks
        stop = len(blocks) - plan.kept_blocks
        set_slices(blocks, plan.mlp_bytes, stop)
        by_groups = set_groups(blocks, plan.mlp_bytes, stop)
        if isinstance(self._walk.weights, StreamedWeights):
            self._walk.weights.defer(by_groups)
        self._walk.set_plan(plan)  # last, because it reads the blocks' settings

    def set_plan_and_residency(self, plan: Plan) -> None:
        """Follow another plan, and keep as many streamed blocks in memory as it says."""
        if isinstance(self._walk.weights, StreamedWeights):
            count = len(self._walk.blocks)
            streamed = count if plan.streamed_blocks is None else plan.streamed_blocks
            self._walk.weights.set_resident_from(streamed)
        self.set_plan(plan)

    def value_and_grad(self, batch: Batch) -> tuple[tuple[mx.array, int], dict]:
        """Mean loss over the labelled tokens, their count, and all gradients, evaluated."""
        gradients: Arrays = {}
        result = self.backward(batch, lambda more: add_into(gradients, more))
        return result, gradient_tree(self.model, gradients)

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; gradients are passed to `sink`.

        `sink` is called with evaluated gradients by name: those of one block at a time, from the
        last block to the first, then those outside the blocks. With several micro-batches each
        name comes once per micro-batch, and the gradients add up. Gradients that `sink` does not
        keep are freed before the next block is computed.
        """
        parts = self._parts(batch)
        count = sum(part.count for part in parts)
        losses = [self._backward(part, part.count / count, sink) for part in parts]
        loss = losses[0] if len(losses) == 1 else mx.stack(losses).sum()
        return loss, count

    def _backward(self, part: "_Part", share: float, sink: Callable[[Arrays], None]) -> mx.array:
        """A part's share of the mean loss; gradients are multiplied by the share as well."""
        run = partial(self.model, part.tokens)
        with self._walk.forward(run, rows=part.rows, packing=part.packing) as state:
            if state.tail is not None:
                loss, outside = self._walk.finish(state, _TailLoss(self, state, part, share))
            else:
                hidden, state.hidden = state.hidden[0], None
                with phase("head"):
                    loss, piece, outside = self._loss(state, hidden, part, gradient=True)
                if share != 1:
                    loss, piece = share * loss, share * piece
                    outside = {name: share * value for name, value in outside.items()}
                state.cotangent = piece.astype(hidden.dtype)[None]
                del hidden, piece
                mx.eval(state.cotangent)
            for more in self._walk.backward(state):
                if self._walk.blocks.local(next(iter(more), "")):
                    sink(more)
                else:
                    add_into(outside, more)
                del more
        if outside:
            mx.eval(outside)
            sink(outside)
        return loss

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; no activations are stored."""
        (loss,), count = self._losses(batch, None)
        return loss, count

    def base_and_adapted_loss(self, batch: Batch) -> tuple[mx.array, mx.array, int]:
        """The losses without and with the adapter, from weights read once; see `loss`.

        Raises:
            EdgeLoraError: the adapter cannot be switched off.
        """
        again = partial(without_adapter, self.model)
        if self._walk.blocks.share_outputs:  # a second forward would replace what the first keeps
            (adapted,), count = self._losses(batch, None)
            with self._walk.inside(again):
                (base,), _ = self._losses(batch, None)
            return base, adapted, count
        (adapted, base), count = self._losses(batch, again)
        return base, adapted, count

    def _losses(
        self, batch: Batch, again: Callable[[], AbstractContextManager] | None
    ) -> tuple[list[mx.array], int]:
        """Mean losses over the labelled tokens, the second one inside `again`, and their count."""
        totals, count = [0.0, 0.0][: 1 + (again is not None)], 0
        for part in self._parts(batch, evaluates=True):
            run = partial(self.model, part.tokens)
            options = {"keep": False, "rows": part.rows, "packing": part.packing, "again": again}
            with self._walk.forward(run, **options) as state:
                hidden, state.hidden = state.hidden[0], None
                losses = [self._loss(state, hidden, part, gradient=False)[0]]
                mx.eval(losses)
                del hidden
                if again is not None:
                    second, state.again = state.again[0], None
                    with again():
                        losses.append(self._loss(state, second, part, gradient=False)[0])
                        mx.eval(losses)
            totals = [total + part.count * loss for total, loss in zip(totals, losses, strict=True)]
            count += part.count
        return [total / count for total in totals], count

    def _parts(self, batch: Batch, evaluates: bool = False) -> list["_Part"]:
        """Divide a batch into micro-batches by its plan, and follow that plan."""
        plan = self.plan_for(batch)
        if plan != self._plan:
            self.set_plan(plan)
        exact = isinstance(self.training_loss, CrossEntropy) and self.head is not None
        fills = self._walk.is_compiled and exact and not evaluates
        return _labelled_parts(batch, plan.micro_batches, fills)

    def close(self) -> None:
        """Free the store's disk space and close the files of the weights."""
        self._walk.store.close()
        self._walk.weights.close()
        set_attention_block(None)

    def _loss(
        self, state: Pass, hidden: mx.array, part: "_Part", gradient: bool
    ) -> tuple[mx.array, mx.array | None, Arrays]:
        if self.head is None:
            return self._chunked_loss(state, hidden, part.labels, gradient)
        if not gradient:
            return self._exact.value(hidden, self.head, part.labels)[0], None, {}
        weights = [] if part.weights is None else [part.weights]
        operands = hidden, self.head, part.labels, *weights
        (loss, _), gradients = self.training_loss.value_and_grad(*operands)
        return loss, gradients.hidden, self.head.gradients_by_name(gradients)

    def _chunked_loss(
        self,
        state: Pass,
        hidden: mx.array,
        labels: mx.array,
        gradient: bool,
        trained: Arrays | None = None,
        evaluate: Callable[..., None] = mx.eval,
    ) -> tuple[mx.array, mx.array | None, Arrays]:
        def logits(hidden: mx.array, trained: Arrays) -> mx.array:
            with self._walk.tail(state, hidden[None], trained):
                return self.model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]

        trained = self._walk.outside() if trained is None else trained
        rows = max(1, LOGITS_BYTES // logits(hidden[:1], trained).nbytes)
        smoothing = self.training_loss.label_smoothing if gradient else 0.0
        return chunked_cross_entropy(
            hidden, labels, logits, trained, rows, gradient, smoothing, evaluate
        )


class _TailLoss:
    """The training loss as a part of the graph of the last blocks; see `tail.GraphLoss`.

    Args:
        engine: the engine with the loss.
        state: the current pass.
        part: part of the batch.
        share: factor of the loss.
    """

    def __init__(self, engine: Engine, state: Pass, part: "_Part", share: float) -> None:
        self._engine, self._state, self._share = engine, state, share
        self.outside = engine.walk.outside()
        loss, head = engine.training_loss, engine.head
        # A loss that chooses tokens by the labels is another graph for every batch.
        compiles = isinstance(loss, CrossEntropy) and head is not None and head.is_resident
        self.key = ("loss", id(engine), loss) if compiles else None
        weights = part.weights
        if weights is None:
            weights = mx.full(part.labels.shape, 1 / part.count)
        self.arrays = [part.labels, share * weights]
        if head is not None:
            check_labels(mx.zeros((part.labels.size, head.dims)), head, part.labels)
        exact = isinstance(loss, CrossEntropy) and head is not None
        # A compiled function keeps the objects that it captures, so it captures nothing of a batch.
        self.graph = partial(_exact_graph, engine.walk, loss, head) if exact else self._any_graph

    def _any_graph(self, hidden: mx.array, outside: Arrays, *arrays: mx.array) -> mx.array:
        """The loss of the part, times its share."""
        engine, (labels, _) = self._engine, arrays
        loss, head, hidden = engine.training_loss, engine.head, hidden.reshape(-1, hidden.shape[-1])
        if head is None:
            return self._share * in_graph(
                lambda hidden, trained: engine._chunked_loss(
                    self._state, hidden, labels, True, trained, _nothing
                ),
                hidden,
                outside,
            )
        with bind_arrays(engine.walk.outside_slots, outside):
            return self._share * loss(hidden, head, labels)[0]


def _exact_graph(
    walk: Walk,
    loss: CrossEntropy,
    head: ModelHead,
    hidden: mx.array,
    outside: Arrays,
    labels: mx.array,
    weights: mx.array,
) -> mx.array:
    """The weighted sum of the losses of [1, n, D], with trained parameters outside the blocks."""
    with bind_arrays(walk.outside_slots, outside):
        return loss.graph(hidden.reshape(-1, hidden.shape[-1]), head, labels, weights)


def _nothing(*_: object) -> None:
    """Evaluate nothing, because a graph is being built."""


class _Part(NamedTuple):
    """Some rows of a batch.

    Attributes:
        tokens: int [B, T].
        rows: int [n], indices among the B * T tokens: the labelled ones and, if there are
            `weights`, some others.
        labels: int [n].
        count: of labelled tokens.
        weights: float32 [n], of each in the mean loss, 0 without a label; None if all are equal.
        packing: where rows share rows; None where they do not.
    """

    tokens: mx.array
    rows: mx.array
    labels: mx.array
    count: int
    weights: mx.array | None = None
    packing: Packing | None = None


def _labelled_parts(batch: Batch, count: int, fills: bool) -> list[_Part]:
    """Divide a batch into `count` parts, or as many as it has rows with labels.

    Args:
        batch: the whole batch.
        count: number of parts.
        fills: whether to add tokens without a label, so that few shapes are compiled.
    """
    mask = batch.mask
    labelled = np.flatnonzero(mask.any(axis=1))
    if not labelled.size:
        raise EdgeLoraError(
            f"batch of rows {list(batch.indices)}: no token carries a label, expected at least "
            "one; raise max_seq_length or leave mask_prompt out"
        )
    inputs, labels, parts = batch.inputs(), batch.labels(), []
    pieces = [slice(None)] if count == 1 else np.array_split(labelled, min(count, labelled.size))
    for piece in pieces:
        # Parts keep the length of the batch, because tokens may depend on later ones or on it.
        own = mask[piece].reshape(-1)
        rows = _pad_rows(own) if fills else np.flatnonzero(own)
        wanted = labels[piece].reshape(-1)[rows]
        number, arrays = int(own.sum()), [inputs[piece], rows, wanted]
        weights = mx.array(own[rows].astype(np.float32) / number) if fills else None
        packing = None if batch.starts is None else Packing(batch.starts[piece])
        parts.append(_Part(*map(mx.array, arrays), number, weights, packing))
    return parts


def _pad_rows(labelled: np.ndarray) -> np.ndarray:
    """Indices of the labelled tokens, padded with others to one of a few counts."""
    step = max(PAD_TO, -(-labelled.size // (FILLED * PAD_TO)) * PAD_TO)
    rows, others = np.flatnonzero(labelled), np.flatnonzero(~labelled)
    missing = min(-rows.size % step, others.size)
    return np.sort(np.concatenate([rows, others[:missing]]))
