"""The training loss of a run, prepared before its first step."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.config.losses import APPROXIMATE
from mlx_edgelora.data import Dataset
from mlx_edgelora.engine.step import Loss
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy
from mlx_edgelora.losses.exact import TILE_BYTES, CrossEntropy
from mlx_edgelora.model.head import ModelHead
from mlx_edgelora.model.neighbour_cache import NeighbourCache
from mlx_edgelora.training.progress import bars

DEFAULT_K = 1000


def check_loss(config: TrainConfig, head: ModelHead | None) -> None:
    """Check that the model supports the configured loss, before any long computation.

    Args:
        config: options of the run.
        head: the model's head; None if its logits are not products with one matrix.

    Raises:
        EdgeLoraError: the approximate loss needs a frozen head and a smaller `loss_k`.
    """
    if config.loss != APPROXIMATE or not config.train:  # a test always uses the exact loss
        return
    if head is None or head.adapter is not None:
        why = (
            "its logits are not products with one matrix" if head is None else "its head is adapted"
        )
        raise EdgeLoraError(
            f"loss: got approximate, but {why}, expected a frozen head; use the exact loss, or "
            "name other layers in lora_parameters.keys"
        )
    if (config.loss_k or 1) > head.vocabulary:
        raise EdgeLoraError(
            f"loss_k: got {config.loss_k}, expected 1 to {head.vocabulary}, the model's vocabulary"
        )


@contextmanager
def training_loss(
    config: TrainConfig,
    head: ModelHead | None,
    train_set: Dataset,
    folder: Path,
    log: Callable[[str], None],
    tile_bytes: int = TILE_BYTES,
) -> Iterator[Loss]:
    """Prepare the configured loss; for the approximate loss compute the nearest tokens first.

    Args:
        config: options of the run, which passed `check_loss`.
        head: the model's head.
        train_set: training rows; nearest tokens are computed for their labels.
        folder: folder in which nearest tokens are cached between runs.
        log: called with lines about the loss and its preparation.
        tile_bytes: size of the tiles in which the exact loss computes logits.

    Yields:
        The loss.
    """
    if config.loss != APPROXIMATE:
        yield CrossEntropy(tile_bytes, config.label_smoothing)
        return
    k = min(config.loss_k or DEFAULT_K, head.vocabulary)
    cache = NeighbourCache(folder, head, k, log)
    try:
        corrected = config.loss_tail_correction in (None, True)
        _build(cache, train_set.labels(), log)
        log(
            f"approximate loss over the {k} nearest tokens of each label, "
            f"{'with' if corrected else 'without'} tail correction"
        )
        total = cache.row_sum() if corrected else None
        yield ApproximateCrossEntropy(
            cache, config.loss_max_subset, total, CrossEntropy(tile_bytes)
        )
    finally:
        cache.close()


def _build(cache: NeighbourCache, labels: np.ndarray, log: Callable[[str], None]) -> None:
    """Compute the nearest tokens that are not cached, with a progress bar on a terminal."""
    missing = cache.missing(labels)
    if not missing.size:
        log(f"nearest tokens: all of {len(labels)} labels are in {cache.path}")
        return
    log(
        f"nearest tokens: {len(missing)} of {len(labels)} labels to compute, kept in "
        f"{cache.path} for the next run"
    )
    with bars(sys.stderr) as shown:
        task = shown.add_task("nearest tokens", total=len(missing), figures="", left="")
        cache.build(missing, lambda count: shown.advance(task, count))
