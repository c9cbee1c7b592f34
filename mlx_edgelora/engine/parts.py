"""Parts of a batch (micro-batches) that are computed one after another."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.packing import Packing
from mlx_edgelora.data import Batch
from mlx_edgelora.data.batches import PAD_TO
from mlx_edgelora.errors import EdgeLoraError

# Number of different counts of labelled tokens for batches of one size: each one is compiled.
FILLED = 8


class Part(NamedTuple):
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


def labelled_parts(batch: Batch, count: int, fills: bool) -> list[Part]:
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
    pieces = [slice(None)] if count == 1 else np.array_split(labelled, min(count, labelled.size))
    return [make_part(batch, piece, fills) for piece in pieces]


def make_part(batch: Batch, piece: slice | np.ndarray, fills: bool) -> Part:
    """Make a part of some rows of a batch; see `labelled_parts`."""
    # Parts keep the length of the batch, because tokens may depend on later ones or on it.
    own = batch.mask[piece].reshape(-1)
    rows = _pad_rows(own) if fills else np.flatnonzero(own)
    wanted = batch.labels()[piece].reshape(-1)[rows]
    number, arrays = int(own.sum()), [batch.inputs()[piece], rows, wanted]
    weights = mx.array(own[rows].astype(np.float32) / number) if fills else None
    packing = None if batch.starts is None else Packing(batch.starts[piece])
    return Part(*map(mx.array, arrays), number, weights, packing)


def _pad_rows(labelled: np.ndarray) -> np.ndarray:
    """Indices of the labelled tokens, padded with others to one of a few counts."""
    step = max(PAD_TO, -(-labelled.size // (FILLED * PAD_TO)) * PAD_TO)
    rows, others = np.flatnonzero(labelled), np.flatnonzero(~labelled)
    missing = min(-rows.size % step, others.size)
    return np.sort(np.concatenate([rows, others[:missing]]))
