"""A tiny model under plain `nn.value_and_grad`: the loop must not care what computes gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.training.adapters import read_adapter_weights

VOCABULARY = 50
# Of a record of the log, behind `iteration`, the loss and the learning rate.
_KEYS = [
    "tokens_per_second",
    "trained_tokens",
    "peak_memory_bytes",
    "footprint_bytes",
    "disk_read_bytes",
    "disk_write_bytes",
    "time",
]


def record_keys(kind):
    """Of a record of the log: training has a norm of gradients."""
    norm = ["grad_norm"] if kind == "train_loss" else []
    return ["iteration", kind, "learning_rate", *norm, *_KEYS]


def make_model(seed=0, blocks=2, dropout=0.0):
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=16,
            num_hidden_layers=blocks,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
        )
    )
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 4, "scale": 8.0, "dropout": dropout})
    mx.eval(model.parameters())
    return model


class PlainEngine:
    empties_cache = True

    def __init__(self, model):
        self.model = model
        self.disk = DiskMeter()
        self.adapters = ResidentAdapterState(model)
        self._value_and_grad = nn.value_and_grad(model, self._mean_loss)

    def _mean_loss(self, tokens, mask):
        logits = self.model(tokens[:, :-1])
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:]) * mask
        return losses.sum() / mask.sum()

    def value_and_grad(self, batch):
        mask = batch.mask
        loss, gradients = self._value_and_grad(mx.array(batch.tokens), mx.array(mask))
        mx.eval(loss, gradients)
        self.disk.add_read(1000)
        self.disk.add_written(500)
        return (loss, int(mask.sum())), gradients

    in_last_part = True

    def backward(self, batch, sink):
        result, gradients = self.value_and_grad(batch)
        sink(dict(tree_flatten(gradients)))
        return result

    def loss(self, batch):
        mask = batch.mask
        return self._mean_loss(mx.array(batch.tokens), mx.array(mask)), int(mask.sum())


class Recorder:
    """A callback that keeps what it was told."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_loss_report(self, info):
        self.train.append(info)

    def on_val_loss_report(self, info):
        self.val.append(info)


class EndsAt:
    """A callback that breaks a run off after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_loss_report(self, info):
        if info["iteration"] == self.step:
            raise ZeroDivisionError

    def on_val_loss_report(self, info):
        pass


def silent(line):
    """Where nobody looks."""


def make_rows(count, lengths, seed=0):
    generator = np.random.default_rng(seed)
    lengths = [lengths] * count if isinstance(lengths, int) else lengths
    return [(generator.integers(1, VOCABULARY, length).tolist(), 0) for length in lengths]


def load_adapter_weights(file, expected):
    """All arrays of an adapter by name, for float32 parameters of these shapes."""
    zeros = {name: mx.zeros(shape) for name, shape in expected.items()}
    return dict(read_adapter_weights(file, zeros))
