"""Exact evaluation of a model, and what training and evaluation ask of an engine."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.batches import Batch, iterate_batches
from mlx_edgelora.engine.adapter_state import AdapterState, Arrays
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.measure.profile import begin_step


class GradientEngine(Protocol):
    """What computes losses and gradients of a model."""

    model: nn.Module
    disk: DiskMeter
    adapters: AdapterState
    empties_cache: bool

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """(mean loss over the labelled tokens, their number).

        `sink` is called with evaluated gradients by name, all in all with each name once.
        """
        ...

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """(mean loss over the labelled tokens, their number), without gradients."""
        ...


def evaluate(
    engine: GradientEngine,
    dataset: Sequence,
    config: TrainConfig,
    num_batches: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Mean loss over the labelled tokens of some batches, the same ones at every call.

    Where all batches are asked for, every row is in one of them, and every label counts once.

    Args:
        engine: its model computes in evaluation mode (no dropout) and is put back.
        dataset: a data set for `iterate_batches`.
        config: gives batch_size, max_seq_length, packing, seed and clear_cache_threshold.
        num_batches: -1 for all.
        advance: called after every batch.

    Returns:
        The mean loss, which may be NaN, and the number of tokens.
    """
    batches = iterate_batches(
        dataset,
        config.batch_size,
        config.max_seq_length,
        loop=False,
        seed=config.seed,
        packing=config.packing,
    )
    losses, counts = [], []
    with _evaluation_mode(engine.model):
        for done, batch in enumerate(batches, start=1):
            begin_step()  # a profile forgets the batch before
            loss, tokens = engine.loss(batch)
            losses.append(loss.item() * tokens)
            counts.append(tokens)
            limit_cache(engine, config)
            advance()
            if done == num_batches:
                break
    return math.fsum(losses) / sum(counts), sum(counts)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def limit_cache(engine: GradientEngine, config: TrainConfig) -> None:
    """Give MLX's cache of freed buffers back to the system, if it holds more than it should."""
    threshold = config.clear_cache_threshold
    if threshold is None and engine.empties_cache:
        threshold = 0
    if threshold is not None and mx.get_cache_memory() > threshold:
        mx.clear_cache()
