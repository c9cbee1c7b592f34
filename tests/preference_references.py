"""TRL's losses of preferences, written in plain MLX, and batches of preferences for them.

After DPOTrainer.dpo_loss (sigmoid), ORPOTrainer.odds_ratio_loss, CPOTrainer.cpo_loss (simpo) and
KTOTrainer.kto_loss of TRL 0.24. Differences are those that docs/preferences.md names.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from harness import random_batch
from mlx_lm.utils import load_model

from mlx_edgelora.data.batches import Batch, Preferences
from mlx_edgelora.engine.gradients import add_into, gradient_tree
from mlx_edgelora.losses.preferences import PreferenceLoss

LOSSES = {
    "dpo": PreferenceLoss("dpo", 0.3),
    "orpo": PreferenceLoss("orpo", 0.4),
    "simpo": PreferenceLoss("simpo", 2.0, 0.6),
    "kto": PreferenceLoss("kto", 0.25, 0.0, 1.3, 0.7),
}


def preference_batch(name, pairs=2, tokens=17, vocabulary=101, seed=0, share=0.4):
    """A batch of pairs, or of answers that are judged alone with as many mismatched ones."""
    rng = np.random.RandomState(seed + 50)

    def rows(count, seed):
        made = random_batch(count, tokens, vocabulary, share, seed)
        made.mask[:, -3] = True
        return Batch(made.tokens, made.mask, made.indices)

    if name != "kto":
        return replace(rows(2 * pairs, seed), preferences=Preferences(_alternate(2 * pairs), 2))
    count = 2 * pairs - 1
    desirable = rng.rand(count) < 0.5
    desirable[:2] = True, False
    return replace(rows(count, seed), preferences=Preferences(desirable, 1, rows(count, seed + 1)))


def _alternate(rows):
    return np.arange(rows) % 2 == 0


def logps(model, batch, average=False):
    """`get_batch_logps`: of each row the sum or the mean over its labelled tokens."""
    logits = model(mx.array(batch.inputs())).astype(mx.float32)
    targets, labelled = mx.array(batch.labels()), mx.array(batch.mask)
    every = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    every = (every - mx.logsumexp(logits, axis=-1)) * labelled
    return every.sum(-1) / labelled.sum(-1) if average else every.sum(-1)


def trl_loss(loss, model, reference, batch):
    """The loss, and the rewards of chosen and of rejected answers."""
    name, beta = loss.name, loss.beta
    policy = logps(model, batch, average=name in ("orpo", "simpo"))
    chosen, rejected = policy[::2], policy[1::2]
    if name == "dpo":
        known = logps(reference, batch)
        logits = (chosen - rejected) - (known[::2] - known[1::2])
        rewards = beta * (chosen - known[::2]), beta * (rejected - known[1::2])
        return -nn.log_sigmoid(beta * logits).mean(), rewards
    rewards = beta * chosen, beta * rejected
    if name == "simpo":
        logits = chosen - rejected - loss.gamma / beta
        return -nn.log_sigmoid(beta * logits).mean(), rewards
    if name == "orpo":
        log_odds = (chosen - rejected) - (mx.log1p(-mx.exp(chosen)) - mx.log1p(-mx.exp(rejected)))
        labelled = mx.array(batch.mask)[::2]
        nll = -logps(model, batch)[::2].sum() / labelled.sum()
        return nll - (beta * nn.log_sigmoid(log_odds)).mean(), rewards
    return _kto(loss, policy, model, reference, batch)


def _kto(loss, policy, model, reference, batch):
    known, mismatched = logps(reference, batch), batch.preferences.mismatched
    kl = mx.stop_gradient((logps(model, mismatched) - logps(reference, mismatched)).mean())
    kl = mx.maximum(kl, 0)
    which = [mx.array(np.flatnonzero(x)) for x in (desirable(batch), ~desirable(batch))]
    chosen, rejected = (policy[rows] - known[rows] for rows in which)
    losses = mx.concatenate(
        [
            loss.desirable_weight * (1 - mx.sigmoid(loss.beta * (chosen - kl))),
            loss.undesirable_weight * (1 - mx.sigmoid(loss.beta * (kl - rejected))),
        ]
    )
    return losses.mean(), (loss.beta * chosen, loss.beta * rejected)


def desirable(batch):
    return batch.preferences.desirable


def trl_value_and_grad(loss, model, folder, batch):
    """TRL's loss, all gradients by MLX's autodiff, and the rewards of chosen and other answers."""
    reference, _ = load_model(folder)

    def of_model(model):
        value, rewards = trl_loss(loss, model, reference, batch)
        return value, *rewards

    (value, *rewards), gradients = nn.value_and_grad(model, of_model)(model)
    mx.eval(value, rewards, gradients)
    return value.item(), gradients, [np.array(reward) for reward in rewards]


def value_and_grad(engine, batch):
    """Loss and gradients by a `PreferenceEngine`."""
    found = {}
    loss, count = engine.backward(batch, lambda more: add_into(found, more))
    return (loss, count), gradient_tree(engine.model, found)
