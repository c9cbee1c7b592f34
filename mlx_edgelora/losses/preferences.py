"""Losses that compare answers: DPO, ORPO, SimPO and KTO, as TRL defines them.

All of them are functions of the log-probabilities of whole answers, so a loss over the vocabulary
(`losses/exact.py`) computes them from the losses of the tokens, in the same pass over the head:

    DPO    -log sigmoid(beta (r_c - r_r)), r = log p - log p_reference   (arXiv 2305.18290)
    ORPO   nll_c - beta log sigmoid(log odds_c - log odds_r)             (arXiv 2403.07691)
    SimPO  -log sigmoid(beta (m_c - m_r) - gamma)                        (arXiv 2405.14734)
    KTO    w (1 - sigmoid(+-beta (r - kl)))                              (arXiv 2402.01306)

with c the chosen and r the rejected answer, p the probability of an answer, m the mean of the
log-probabilities of its tokens, odds = exp(m) / (1 - exp(m)), nll_c the mean loss of the labelled
tokens of all chosen answers, and kl the mean of r over answers to other prompts, at least 0. The
derivative by the losses of tokens is MLX's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

DPO, ORPO, SIMPO, KTO = "dpo", "orpo", "simpo", "kto"
PREFERENCE_LOSSES = (DPO, ORPO, SIMPO, KTO)
# A mean log-probability of 0 has infinite odds.
MOST = -1e-7


class Answers(NamedTuple):
    """Which tokens belong to which answer of a batch or a part of it.

    Attributes:
        places: int32 [B, T], index of each token among the n tokens with a loss; n where it has no
            label. In a batch of pairs, rows 2 i and 2 i + 1 are a chosen and a rejected answer.
        reference: float32 [B], log-probabilities by the reference model; zeros without one.
        desirable: float32 [B], 1 for chosen and desirable answers, 0 for others.
        totals: float32 [3]: pairs of the whole batch (rows for KTO), labelled tokens of its chosen
            answers, and the term kl of KTO.
    """

    places: mx.array
    reference: mx.array
    desirable: mx.array
    totals: mx.array


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss that compares answers.

    Attributes:
        name: one of `PREFERENCE_LOSSES`.
        beta: strength of the preference.
        gamma: target margin of SimPO.
        desirable_weight: weight of desirable answers in KTO.
        undesirable_weight: weight of undesirable answers in KTO.
    """

    name: str
    beta: float
    gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def has_reference(self) -> bool:
        """Whether the log-probabilities of the reference model are needed."""
        return self.name in (DPO, KTO)

    def __call__(
        self, losses: mx.array, places: mx.array, *others: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Compute the part of the mean loss that these answers have; differentiable in `losses`.

        Args:
            losses: float32 [n], loss of each token: minus its log-probability.
            places: see `Answers`, as are `others`.

        Returns:
            The loss, float32 [], and sums for `Figures`, float32 [6].
        """
        answers = Answers(places, *others)
        sums, counts = sums_of_answers(losses, places)
        if self.name == KTO:
            return self._kto(sums, answers)
        pairs, tokens = answers.totals[0], answers.totals[1]
        means = sums / counts
        scores = sums - answers.reference if self.name == DPO else means
        chosen, rejected = scores[::2], scores[1::2]
        if self.name == DPO:
            terms = -nn.log_sigmoid(self.beta * (chosen - rejected))
        elif self.name == SIMPO:
            terms = -nn.log_sigmoid(self.beta * (chosen - rejected) - self.gamma)
        else:
            terms = -self.beta * nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
        loss = terms.sum() / pairs
        if self.name == ORPO:
            loss = loss - sums[::2].sum() / tokens
        rewards = self.beta * mx.stop_gradient(scores)
        right = (rewards[::2] > rewards[1::2]).sum()
        count = mx.array(chosen.size)
        return loss, _figures(rewards[::2].sum(), count, rewards[1::2].sum(), count, right, count)

    def _kto(self, sums: mx.array, answers: Answers) -> tuple[mx.array, mx.array]:
        rows, kl, desirable = answers.totals[0], answers.totals[2], answers.desirable
        ratios = sums - answers.reference
        signs = 2 * desirable - 1
        undesirable = 1 - desirable
        weights = self.desirable_weight * desirable + self.undesirable_weight * undesirable
        terms = weights * (1 - mx.sigmoid(self.beta * signs * (ratios - kl)))
        rewards = self.beta * mx.stop_gradient(ratios)
        right = (signs * rewards > 0).sum()
        return terms.sum() / rows, _figures(
            (desirable * rewards).sum(),
            desirable.sum(),
            (undesirable * rewards).sum(),
            undesirable.sum(),
            right,
            mx.array(desirable.size),
        )


def sums_of_answers(losses: mx.array, places: mx.array) -> tuple[mx.array, mx.array]:
    """The log-probability of each answer and its number of labelled tokens, float32 [B].

    Args:
        losses: float32 [n], loss of each token.
        places: see `Answers`.
    """
    # Taken by rows and not added up by index: on a GPU the order of additions would vary.
    table = mx.concatenate([losses, mx.zeros((1,))])[places]
    return -table.sum(axis=1), (places < losses.size).sum(axis=1).astype(mx.float32)


def _log_odds(means: mx.array) -> mx.array:
    """log(p / (1 - p)) of p = exp(means)."""
    means = mx.minimum(means, MOST)
    return means - mx.log(-mx.expm1(means))


def _figures(*sums: mx.array) -> mx.array:
    return mx.stack([value.astype(mx.float32) for value in sums])


@dataclass(frozen=True)
class Figures:
    """Figures about the answers of batches, which add up.

    Attributes:
        sums: sum of the rewards of chosen or desirable answers and their number, the same of the
            others, and the number of right comparisons and of all. The reward is TRL's: beta times
            the log-probability relative to the reference model, or times the mean
            log-probability of the tokens without one. A pair is right if the chosen answer has the
            larger reward, an answer of KTO if its reward is above or below 0 as its label says.
    """

    sums: tuple[float, ...] = (0.0,) * 6

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    @property
    def margin(self) -> float | None:
        """Mean reward of chosen answers minus that of others; None if there are none of one."""
        chosen, n, rejected, m, _, _ = self.sums
        return chosen / n - rejected / m if n and m else None

    def record(self) -> dict[str, float]:
        """The figures that are known, for records."""
        known = {"reward_margin": self.margin, "accuracy": self.accuracy}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def accuracy(self) -> float | None:
        """Share of right comparisons, from 0 to 1; None without any."""
        return self.sums[4] / self.sums[5] if self.sums[5] else None
