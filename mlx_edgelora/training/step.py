"""One training step's loss and gradients: the walk over blocks and the masked, tiled loss."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_edgelora.data import Batch
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy
from mlx_edgelora.losses.chunked import chunked_cross_entropy
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.memory.blockwise import Arrays, BlockWalk, Pass
from mlx_edgelora.memory.gradients import add_into, gradient_tree
from mlx_edgelora.memory.meter import DiskMeter
from mlx_edgelora.memory.profile import phase
from mlx_edgelora.model.head import ModelHead
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

    def value_and_grad(self, batch: Batch) -> tuple[tuple[mx.array, int], dict]:
        """Mean loss over the labelled tokens, their count, and all gradients, evaluated."""
        gradients: Arrays = {}
        result = self.backward(batch, gradients.update)
        return result, gradient_tree(self.model, gradients)

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; gradients go to `sink`.

        It is called with evaluated gradients by name, of one block at a time from the last
        one down, and at the end of what lies outside the blocks; no name comes twice. What
        it does not keep is gone before the next block is computed.
        """
        tokens, rows, labels = _labelled(batch)
        with self._walk.forward(lambda: self.model(tokens), rows=rows) as state:
            hidden, state.hidden = state.hidden[0], None
            with phase("head"):
                loss, piece, outside = self._loss(state, hidden, labels, gradient=True)
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
        return loss, labels.size

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; nothing is kept or spilled."""
        tokens, rows, labels = _labelled(batch)
        with self._walk.forward(lambda: self.model(tokens), keep=False, rows=rows) as state:
            hidden, state.hidden = state.hidden[0], None
            loss, _, _ = self._loss(state, hidden, labels, gradient=False)
        return loss, labels.size

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


def _labelled(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Inputs [B, T], indices of labelled positions in [B * T], and their labels."""
    mask = batch.mask()
    rows = np.flatnonzero(mask)
    if not rows.size:
        raise EdgeLoraError(
            f"batch of rows {list(batch.indices)}: no token carries a label, expected at least "
            "one; raise max_seq_length or leave mask_prompt out"
        )
    labels = batch.labels().reshape(-1)[rows]
    return mx.array(batch.inputs()), mx.array(rows), mx.array(labels)
