"""One training step's loss and gradients: the walk over blocks and the masked, tiled loss."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_edgelora.data import Batch
from mlx_edgelora.data.batches import PAD_TO
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy
from mlx_edgelora.losses.chunked import chunked_cross_entropy
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.memory.blockwise import Arrays, BlockWalk, Pass
from mlx_edgelora.memory.gradients import add_into, gradient_tree
from mlx_edgelora.memory.meter import DiskMeter
from mlx_edgelora.memory.plan import Plan
from mlx_edgelora.memory.profile import phase
from mlx_edgelora.model.head import ModelHead
from mlx_edgelora.model.mlp import set_slices
from mlx_edgelora.training.trained import ResidentTrained, Trained

Loss = CrossEntropy | ApproximateCrossEntropy

# Float32 logits of a chunk of tokens, where all logits of a token are made at once.
LOGITS_BYTES = 4 * 2**20


class Engine:
    """Computes losses and gradients of batches, at a bounded peak.

    Tokens that carry no label never reach the final norm and the head, so a masked prompt
    costs no logits; where the walk can, not even the last block but its keys and values.

    Args:
        model: the adapted model.
        walk: the walk over its blocks.
        head: its head by tiles; None computes whole rows of logits.
        disk: counts what the weights and the store read and write.
        training_loss: the exact one by default. Evaluation is always exact, and a head that
            is None takes no other than an exact one.
        trained: where trained parameters are, the source of the walk's adapters; by default
            the model.

    Attributes:
        plan_of: the plan for a batch, where it is not always that of the last `obey`.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: BlockWalk,
        head: ModelHead | None,
        disk: DiskMeter,
        training_loss: Loss | None = None,
        trained: Trained | None = None,
    ) -> None:
        self.model, self.disk = model, disk
        self.trained = ResidentTrained(model) if trained is None else trained
        self._walk, self.head = walk, head
        # The head's tiles are as large in evaluation.
        tiles = getattr(training_loss, "exact", training_loss) or CrossEntropy()
        self._exact = CrossEntropy(tiles.tile_bytes)
        self.training_loss = training_loss or self._exact
        self._plan = Plan()
        self.plan_of: Callable[[Batch], Plan] = lambda batch: self._plan

    @property
    def walk(self) -> BlockWalk:
        """The walk over the model's blocks."""
        return self._walk

    @property
    def plan(self) -> Plan:
        """What is obeyed now."""
        return self._plan

    def obey(self, plan: Plan) -> None:
        """Compute from now on as a plan says; what it leaves in memory or on disk stays there."""
        self._plan = plan
        self._walk.obey(plan)
        blocks = self._walk.blocks
        set_slices(blocks, plan.mlp_bytes, len(blocks) - plan.kept_blocks)

    def hold(self, plan: Plan) -> None:
        """Obey a plan that has fewer blocks' weights in memory than the one before."""
        if plan.streams:
            count = len(self._walk.blocks)
            streamed = count if plan.streamed_blocks is None else plan.streamed_blocks
            self._walk.weights.hold_from(streamed)
        self.obey(plan)

    def value_and_grad(self, batch: Batch) -> tuple[tuple[mx.array, int], dict]:
        """Mean loss over the labelled tokens, their count, and all gradients, evaluated."""
        gradients: Arrays = {}
        result = self.backward(batch, lambda more: add_into(gradients, more))
        return result, gradient_tree(self.model, gradients)

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; gradients go to `sink`.

        It is called with evaluated gradients by name, of one block at a time from the last
        one down, and at the end of what lies outside the blocks; where the plan has more
        micro-batches than one, so often, and the gradients add up. What it does not keep is
        gone before the next block is computed.
        """
        parts = self._parts(batch)
        count = sum(part.labels.size for part in parts)
        losses = [self._backward(part, part.labels.size / count, sink) for part in parts]
        loss = losses[0] if len(losses) == 1 else mx.stack(losses).sum()
        return loss, count

    def _backward(self, part: "_Part", share: float, sink: Callable[[Arrays], None]) -> mx.array:
        """A part's share of the mean loss; gradients are multiplied by the share as well."""
        with self._walk.forward(lambda: self.model(part.tokens), rows=part.rows) as state:
            hidden, state.hidden = state.hidden[0], None
            with phase("head"):
                loss, piece, outside = self._loss(state, hidden, part.labels, gradient=True)
            if share != 1:
                piece = share * piece
                outside = {name: share * value for name, value in outside.items()}
            state.cotangent = piece.astype(hidden.dtype)[None]
            del hidden, piece
            mx.eval(state.cotangent)
            for more in self._walk.backward(state):
                if any(map(self._walk.blocks.local, more)):
                    sink(more)
                else:
                    add_into(outside, more)
                del more
        if outside:
            mx.eval(outside)
            sink(outside)
        return loss if share == 1 else share * loss

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; nothing is kept or spilled."""
        total, count = 0.0, 0
        for tokens, rows, labels in self._parts(batch):
            run = partial(self.model, tokens)
            with self._walk.forward(run, keep=False, rows=rows) as state:
                hidden, state.hidden = state.hidden[0], None
                loss, _, _ = self._loss(state, hidden, labels, gradient=False)
            total, count = total + labels.size * loss, count + labels.size
        return total / count, count

    def _parts(self, batch: Batch) -> list["_Part"]:
        """The batch as its plan divides it; that plan is obeyed from now on."""
        plan = self.plan_of(batch)
        if plan != self._plan:
            self.obey(plan)
        return _labelled(batch, plan.micro_batches)

    def close(self) -> None:
        """Give the store's disk space back."""
        self._walk.store.close()

    def _loss(
        self, state: Pass, hidden: mx.array, labels: mx.array, gradient: bool
    ) -> tuple[mx.array, mx.array | None, Arrays]:
        if self.head is None:
            return self._chunked_loss(state, hidden, labels, gradient)
        if not gradient:
            return self._exact.value(hidden, self.head, labels)[0], None, {}
        (loss, _), gradients = self.training_loss.value_and_grad(hidden, self.head, labels)
        return loss, gradients.hidden, self.head.named(gradients)

    def _chunked_loss(
        self, state: Pass, hidden: mx.array, labels: mx.array, gradient: bool
    ) -> tuple[mx.array, mx.array | None, Arrays]:
        def logits(hidden: mx.array, trained: Arrays) -> mx.array:
            with self._walk.tail(state, hidden[None], trained):
                return self.model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]

        trained = self._walk.outside()
        rows = max(1, LOGITS_BYTES // logits(hidden[:1], trained).nbytes)
        smoothing = self.training_loss.label_smoothing if gradient else 0.0
        return chunked_cross_entropy(hidden, labels, logits, trained, rows, gradient, smoothing)


class _Part(NamedTuple):
    """Some rows of a batch: inputs [B, T], indices of labelled ones of B * T, their labels."""

    tokens: mx.array
    rows: mx.array
    labels: mx.array


def _labelled(batch: Batch, count: int) -> list[_Part]:
    """A batch in so many parts, fewer where it has not as many rows with labels."""
    mask = batch.mask()
    labelled = np.flatnonzero(mask.any(axis=1))
    if not labelled.size:
        raise EdgeLoraError(
            f"batch of rows {list(batch.indices)}: no token carries a label, expected at least "
            "one; raise max_seq_length or leave mask_prompt out"
        )
    inputs, labels, parts = batch.inputs(), batch.labels(), []
    pieces = [slice(None)] if count == 1 else np.array_split(labelled, min(count, labelled.size))
    for piece in pieces:
        own, width = mask[piece], mask.shape[1]
        if count > 1:  # what follows the last label has no part in the loss
            last = 1 + np.flatnonzero(own.any(axis=0))[-1]
            width = min(width, -(-last // PAD_TO) * PAD_TO)
        rows = np.flatnonzero(own[:, :width])
        wanted = labels[piece][:, :width].reshape(-1)[rows]
        parts.append(_Part(mx.array(inputs[piece][:, :width]), mx.array(rows), mx.array(wanted)))
    return parts
