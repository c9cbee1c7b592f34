"""Contenders that would win an unguarded benchmark, one per way in which others were fooled."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from mlx_edgelora.benchmark.contenders import _dataset, batches_of


class _Training:
    """mlx-lm's step, for cheats to take parts of."""

    def __init__(self, job):
        self.model, tokenizer = load(job.model)
        self.model.freeze()
        settings = {"rank": job.rank, "scale": job.scale, "dropout": 0.0}
        linear_to_lora_layers(self.model, len(self.model.layers), settings)
        self.model.load_weights(job.start, strict=False)
        self.model.train()
        self.optimizer = optimizers.AdamW(job.learning_rate)
        self.value_and_grad = nn.value_and_grad(self.model, trainer.default_loss)
        data = CacheDataset(_dataset(job, tokenizer))
        arguments = {"dataset": data, "batch_size": job.batch, "max_seq_length": job.limit}
        batches = batches_of(job)(**arguments, loop=True)
        self.batches = (batch for _, batch in zip(range(job.last), batches, strict=False))

    def trained(self):
        return dict(tree_flatten(self.model.trainable_parameters()))


def honest(job, pause):
    """But for the counter of its peak, which it resets before every report."""
    run = _Training(job)
    for batch in run.batches:
        (loss, _), gradients = run.value_and_grad(run.model, *batch)
        run.optimizer.update(run.model, gradients)
        mx.eval(run.model.trainable_parameters(), run.optimizer.state)
        loss = loss.item()
        mx.reset_peak_memory()
        pause(loss, run.trained())


def trains_nothing(job, pause):
    run = _Training(job)
    for batch in run.batches:
        pause(trainer.default_loss(run.model, *batch)[0].item(), run.trained())


def skips_the_optimizer(job, pause):
    run = _Training(job)
    for batch in run.batches:
        (loss, _), gradients = run.value_and_grad(run.model, *batch)
        mx.eval(gradients)
        pause(loss.item(), run.trained())


def reports_a_promise(job, pause):
    run = _Training(job)
    for batch in run.batches:
        (loss, _), gradients = run.value_and_grad(run.model, *batch)
        run.optimizer.update(run.model, gradients)
        pause(loss, run.trained())


def updates_later(job, pause):
    """The loss is there, the update is a graph; what it waits for takes longer than noise."""
    run = _Training(job)
    for batch in run.batches:
        (loss, _), gradients = run.value_and_grad(run.model, *batch)
        slow = mx.ones((1024, 1024))
        for _ in range(40):
            slow = (slow @ slow) / 1024
        gradients = tree_map(lambda g, slow=slow: g * slow[0, 0], gradients)
        run.optimizer.update(run.model, gradients)
        pause(loss.item(), run.trained())


def vanishes(job, pause):
    run = _Training(job)
    for _ in zip(range(2), run.batches, strict=False):
        pause(1.0, run.trained())
    raise SystemExit(3)
