"""Exact evaluation of a model, and the interface of engines for training and evaluation."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.batches import Batch, iterate_batches
from mlx_edgelora.engine.adapter_state import AdapterState, Arrays
from mlx_edgelora.engine.preferences import take_figures
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.losses.preferences import Figures
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.measure.profile import begin_step
from mlx_edgelora.training.group import Group
from mlx_edgelora.training.sharing import Shares


class GradientEngine(Protocol):
    """Interface of engines, which compute losses and gradients of a model."""

    model: nn.Module
    disk: DiskMeter
    adapters: AdapterState
    empties_cache: bool
    in_last_part: bool

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """Compute the gradients of a batch.

        Args:
            batch: the batch.
            sink: called several times with evaluated gradients by name; a name occurs once in
                each micro-batch, the last time where `in_last_part`.

        Returns:
            The mean loss over the labelled tokens, and the number of these; or the mean over what
            `Batch.terms` counts, and this.
        """
        ...

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """The mean loss and the number of its terms, without gradients; see `backward`."""
        ...


def evaluate(
    engine: GradientEngine,
    dataset: Sequence,
    config: TrainConfig,
    num_batches: int,
    advance: Callable[[], None] = lambda: None,
    group: Group | None = None,
) -> tuple[float, int]:
    """Mean loss over the labelled tokens of batches that are the same at every call.

    With all batches, every row is in one batch and every label counts once.

    Args:
        engine: its model is in evaluation mode (no dropout) during the call.
        dataset: a data set for `iterate_batches`.
        config: batch_size, max_seq_length, packing, seed and clear_cache_threshold are used.
        num_batches: number of batches; -1 for all.
        advance: called after every batch.
        group: processes that share the rows; None for this one alone.

    Returns:
        The mean loss, which may be NaN, and the number of labelled tokens. `rewards`
        gives the figures about answers.
    """

    def measure(batch: Batch) -> tuple[list[mx.array], int]:
        loss, tokens = engine.loss(batch)
        return [loss], tokens

    arguments = dataset, config, num_batches, advance
    (loss,), tokens = _mean_losses(engine, measure, 1, *arguments, group or Group())
    return loss, tokens


def evaluate_both(
    engine: Engine,
    dataset: Sequence,
    config: TrainConfig,
    num_batches: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, float, int]:
    """Mean losses without and with the adapter, and the number of labels; see `evaluate`."""

    def measure(batch: Batch) -> tuple[list[mx.array], int]:
        base, adapted, tokens = engine.base_and_adapted_loss(batch)
        return [base, adapted], tokens

    arguments = dataset, config, num_batches, advance
    losses, tokens = _mean_losses(engine, measure, 2, *arguments, Group())
    return *losses, tokens


def _mean_losses(
    engine: GradientEngine,
    measure: Callable[[Batch], tuple[list[mx.array], int]],
    width: int,
    dataset: Sequence,
    config: TrainConfig,
    num_batches: int,
    advance: Callable[[], None],
    group: Group,
) -> tuple[list[float], int]:
    """Means of the `width` losses that `measure` gives of each batch, and the number of labels.

    `measure` gives mean losses of a batch, and of how many terms they are the means.
    """
    batches = iterate_batches(
        dataset,
        config.batch_size,
        config.max_seq_length,
        loop=False,
        seed=config.seed,
        packing=config.packing,
    )
    losses, counts, labels = [], [], 0
    shares = Shares(group, config.batch_size)
    with _evaluation_mode(engine.model), group.failing_together(width + 2):
        for done, batch in enumerate(batches, start=1):
            for piece in shares.pieces(batch):
                begin_step()  # a memory profile starts anew with every batch
                found, terms = measure(piece)
                losses.append([loss.item() * terms for loss in found])
                counts.append(terms)
                labels += int(piece.mask.sum())
                limit_cache(engine, config)
            advance()
            if done == num_batches:
                break
    sums = [math.fsum(each) for each in zip(*losses, strict=True)] or [0.0] * width
    *totals, count, labels = group.exchange([*sums, sum(counts), labels])
    return [total / count for total in totals], round(labels)


def rewards(engine: GradientEngine, group: Group) -> Figures | None:
    """Figures of all processes about the answers since the last call; None for other losses."""
    own = take_figures(engine)
    return None if own is None else Figures(tuple(group.exchange(own.sums)))


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def limit_cache(engine: GradientEngine, config: TrainConfig) -> None:
    """Clear MLX's cache of freed buffers if it is larger than its threshold.

    The threshold is `clear_cache_threshold` in bytes; by default 0 if the engine empties the
    cache, and none otherwise.
    """
    threshold = config.clear_cache_threshold
    if threshold is None and engine.empties_cache:
        threshold = 0
    if threshold is not None and mx.get_cache_memory() > threshold:
        mx.clear_cache()
