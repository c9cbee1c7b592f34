"""One training step's loss and gradients for preferences: whole answers are compared.

A row's log-probability is known when the head has been read, and that is when the weights of its
tokens in the gradient are known, too. So a step is the same walk as with cross-entropy. Before it,
DPO and KTO walk forward without the adapter, which is their reference model: nothing is kept of it
but one number for each row. KTO also walks forward over answers that belong to other prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.data.batches import Batch
from mlx_edgelora.engine.adapter_state import AdapterState
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.parts import Part, make_part
from mlx_edgelora.engine.step import Engine, evaluate_nothing
from mlx_edgelora.engine.walk import Pass, Walk
from mlx_edgelora.losses.chunked import in_graph
from mlx_edgelora.losses.exact import CrossEntropy, check_labels
from mlx_edgelora.losses.preferences import (
    KTO,
    Answers,
    Figures,
    PreferenceLoss,
    sums_of_answers,
)
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.model.head import ModelHead
from mlx_edgelora.model.lora import without_adapter


class PreferenceEngine:
    """Computes losses and gradients of batches of preferences with the walk of another engine.

    It is an engine for the training loop (`training.evaluate.GradientEngine`).

    Args:
        engine: the engine of the model, with the exact loss.
        loss: the loss of the answers.
    """

    def __init__(self, engine: Engine, loss: PreferenceLoss) -> None:
        self._engine, self.preference_loss = engine, loss
        self._figures = Figures()

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._engine.model

    @property
    def disk(self) -> DiskMeter:
        """Counts the bytes that weights and store read and write."""
        return self._engine.disk

    @property
    def adapters(self) -> AdapterState:
        """State of the adapters."""
        return self._engine.adapters

    @property
    def empties_cache(self) -> bool:
        """Whether MLX's buffer cache is emptied after every step."""
        return self._engine.empties_cache

    @property
    def in_last_part(self) -> bool:
        """See `Engine`."""
        return self._engine.in_last_part

    def take_figures(self) -> Figures:
        """Figures about the answers of all batches since the last call."""
        found, self._figures = self._figures, Figures()
        return found

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """Mean loss over pairs or judged answers, and their number; see `Engine.backward`."""
        engine, totals = self._engine, _totals(batch, self._kl(batch))
        parts = engine.parts(batch, answer_parts)
        references = self._references(parts)
        values = []
        for part, reference in zip(engine.in_turn(parts), references, strict=True):
            answers = Answers(part.places, reference, part.desirable, totals)
            loss_of = partial(_AnswerLoss, engine, self.preference_loss, part.part, answers)
            values.append(engine.compute(part.part, loss_of, sink))
        return self._summed(values), batch.terms

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """Mean loss over pairs or judged answers, and their number; see `Engine.loss`."""
        totals = _totals(batch, self._kl(batch))
        values = []
        for part in self._engine.parts(batch, answer_parts, evaluates=True):
            losses, reference = self._both(part)
            answers = Answers(part.places, reference, part.desirable, totals)
            values.append(self.preference_loss(losses, *answers))
            mx.eval(values[-1])
        return self._summed(values), batch.terms

    def _summed(self, values: Sequence[tuple[mx.array, mx.array]]) -> mx.array:
        """The sum of the losses of parts; their figures are kept."""
        for _, sums in values:
            self._figures += Figures(tuple(sums.tolist()))
        losses = [loss for loss, _ in values]
        return losses[0] if len(losses) == 1 else mx.stack(losses).sum()

    @property
    def _off(self) -> Callable[[], AbstractContextManager]:
        return partial(without_adapter, self._engine.model)

    def _references(self, parts: Sequence["AnswerPart"]) -> list[mx.array]:
        """Log-probabilities of answers by the reference model, [B] of each part; or zeros."""
        if not self.preference_loss.has_reference:
            return [mx.zeros(part.desirable.shape) for part in parts]
        with self._engine.walk.inside(self._off):
            found = [(self._engine.token_losses(part.part)[0], part.places) for part in parts]
        references = [sums_of_answers(*each)[0] for each in found]
        mx.eval(references)
        return references

    def _both(self, part: "AnswerPart") -> tuple[mx.array, mx.array]:
        """Losses of tokens, and log-probabilities of answers by the reference model or zeros."""
        if not self.preference_loss.has_reference:
            return self._engine.token_losses(part.part)[0], mx.zeros(part.desirable.shape)
        losses, others = self._engine.token_losses(part.part, self._off)
        return losses, sums_of_answers(others, part.places)[0]

    def _kl(self, batch: Batch) -> float:
        """KTO's estimate of the divergence from the reference model; 0 for other losses."""
        if self.preference_loss.name != KTO:
            return 0.0
        total, mismatched = 0.0, batch.preferences.mismatched
        for part in self._engine.parts(mismatched, answer_parts, evaluates=True):
            losses, reference = self._both(part)
            total += (sums_of_answers(losses, part.places)[0] - reference).sum().item()
        return max(0.0, total / len(mismatched.mask))


def take_figures(engine: object) -> Figures | None:
    """Figures about the answers of all batches since the last call; None for other engines."""
    return engine.take_figures() if isinstance(engine, PreferenceEngine) else None


class AnswerPart(NamedTuple):
    """Some answers of a batch; pairs are not divided.

    Attributes:
        part: their tokens.
        places: see `Answers`.
        desirable: see `Answers`.
    """

    part: Part
    places: mx.array
    desirable: mx.array


def answer_parts(batch: Batch, count: int, fills: bool) -> list[AnswerPart]:
    """Divide a batch into `count` parts, or as many as it has pairs or judged answers.

    Args:
        batch: the whole batch.
        count: number of parts.
        fills: see `parts.labelled_parts`.
    """
    known = batch.preferences
    together = 1 if known is None else known.together
    desirable = np.zeros(len(batch.mask), bool) if known is None else known.desirable
    groups = np.arange(len(batch.mask)).reshape(-1, together)
    parts = []
    for rows in np.array_split(groups, min(count, len(groups))):
        piece = rows.reshape(-1)
        part = make_part(batch, piece, fills)
        own, taken = batch.mask[piece], np.array(part.rows)
        labelled = own.reshape(-1)[taken]
        places = np.full(own.size, len(taken), np.int32)
        places[taken[labelled]] = np.flatnonzero(labelled)
        own_desirable = mx.array(desirable[piece].astype(np.float32))
        parts.append(AnswerPart(part, mx.array(places.reshape(own.shape)), own_desirable))
    return parts


def _totals(batch: Batch, kl: float) -> mx.array:
    return mx.array([batch.terms, max(1, batch.terms * batch.chosen_labels), kl], mx.float32)


class _AnswerLoss:
    """The loss of the answers of a part; see `step.PartLoss`.

    Args:
        engine: the engine with the walk.
        loss: the loss of the answers.
        part: part of the batch.
        answers: its answers.
        state: the current pass.
    """

    def __init__(
        self, engine: Engine, loss: PreferenceLoss, part: Part, answers: Answers, state: Pass
    ) -> None:
        self._engine, self._loss, self._state = engine, loss, state
        self._labels, self._answers = part.labels, answers
        self.outside, self.arrays = engine.walk.outside(), [part.labels, *answers]
        head, exact = engine.head, engine.exact
        compiles = head is not None and head.is_resident
        self.key = ("answers", id(engine), exact, loss) if compiles else None
        if head is not None and state.tail is not None:
            check_labels(mx.zeros((part.labels.size, head.dims)), head, part.labels)
        # A compiled function keeps the objects that it captures, so it captures nothing of a batch.
        self.graph = self._any_graph
        if head is not None:
            self.graph = partial(_exact_graph, engine.walk, exact, loss, head)

    def value_and_grad(self, hidden: mx.array) -> tuple[tuple, mx.array, Arrays]:
        """See `PartLoss`; evaluated piece by piece."""
        engine, labels, objective = self._engine, self._labels, self._objective
        if engine.head is None:
            return engine.chunked(self._state, hidden, labels, gradient=True, objective=objective)
        (value, _), gradients = engine.exact.value_and_grad(
            hidden, engine.head, labels, objective=objective
        )
        return value, gradients.hidden, engine.head.gradients_by_name(gradients)

    def _objective(self, losses: mx.array) -> tuple[mx.array, mx.array]:
        return self._loss(losses, *self._answers)

    def _any_graph(self, hidden: mx.array, outside: Arrays, *_: mx.array) -> tuple:
        def value_and_grad(hidden: mx.array, trained: Arrays) -> tuple:
            arguments = self._labels, True, trained, evaluate_nothing, self._objective
            return self._engine.chunked(self._state, hidden, *arguments)

        return in_graph(value_and_grad, hidden.reshape(-1, hidden.shape[-1]), outside, True)


def _exact_graph(
    walk: Walk,
    exact: CrossEntropy,
    loss: PreferenceLoss,
    head: ModelHead,
    hidden: mx.array,
    outside: Arrays,
    labels: mx.array,
    *answers: mx.array,
) -> tuple[mx.array, mx.array]:
    """The loss of the answers in [1, n, D], with trained parameters outside the blocks."""
    with bind_arrays(walk.outside_slots, outside):
        return exact.graph(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            labels,
            objective=lambda losses: loss(losses, *answers),
        )
