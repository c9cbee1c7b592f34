from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten, tree_map
from training_helpers import make_model

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.training.optimizer import build_optimizer, update

SETTINGS = {
    "adam": {"bias_correction": True},
    "adamw": {"weight_decay": 0.1, "betas": [0.8, 0.9]},
    "muon": {},
    "sgd": {"momentum": 0.9},
    "adafactor": {},
}


def config(optimizer="adamw", **changes):
    values = {"learning_rate": 1e-2, "lr_schedule": None, "optimizer_config": SETTINGS}
    return SimpleNamespace(optimizer=optimizer, **{**values, **changes})


def random_gradients(model, step):
    key = mx.random.key(step)
    return tree_map(
        lambda p: mx.random.normal(p.shape, key=key) + 0.0 * p, model.trainable_parameters()
    )


def flat(tree):
    return dict(tree_flatten(tree))


@pytest.mark.parametrize("name", SETTINGS)
def test_blockwise_update_is_the_plain_one_bit_for_bit(name):
    models = [make_model(), make_model()]
    plain, ours = build_optimizer(config(name)), build_optimizer(config(name))
    start = flat(models[0].trainable_parameters())
    for step in range(3):
        plain.update(models[0], random_gradients(models[0], step))
        mx.eval(models[0].parameters(), plain.state)
        update(models[1], ours, random_gradients(models[1], step))
    expected, got = (flat(model.trainable_parameters()) for model in models)
    assert got.keys() == expected.keys()
    for key in expected:
        assert mx.array_equal(got[key], expected[key]), key
        assert not mx.array_equal(got[key], start[key]), key
    expected, got = flat(plain.state), flat(ours.state)
    assert got.keys() == expected.keys()
    assert all(mx.array_equal(got[key], expected[key]) for key in expected)


class Stack(nn.Module):
    def __init__(self, blocks, size):
        super().__init__()
        self.layers = [nn.Linear(size, size, bias=False) for _ in range(blocks)]


def peak_of_update(apply):
    blocks, size = 16, 256  # 256 KiB a block
    model, optimizer = Stack(blocks, size), build_optimizer(config())
    for _ in range(2):
        gradients = tree_map(mx.ones_like, model.trainable_parameters())
        mx.eval(model.parameters(), gradients)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        apply(model, optimizer, gradients)
        del gradients
    return (mx.get_peak_memory() - before) / (4 * size * size)


def test_update_peaks_at_a_few_arrays_whatever_the_depth():
    def at_once(model, optimizer, gradients):
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)

    assert peak_of_update(update) < 8
    assert peak_of_update(at_once) > 12  # the measure sees what the blocks save


def test_update_empties_what_it_was_given():
    model, optimizer = make_model(), build_optimizer(config())
    gradients = random_gradients(model, 0)
    update(model, optimizer, gradients)
    assert gradients == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", optimizers.Adam),
        ("adamw", optimizers.AdamW),
        ("muon", optimizers.Muon),
        ("sgd", optimizers.SGD),
        ("adafactor", optimizers.Adafactor),
    ],
)
def test_names_of_mlx_lm(name, kind):
    optimizer = build_optimizer(config(name))
    assert type(optimizer) is kind
    assert optimizer.learning_rate.item() == pytest.approx(1e-2)


def test_arguments_reach_the_optimizer():
    assert build_optimizer(config("adamw")).weight_decay == 0.1
    assert build_optimizer(config("adamw", optimizer_config={})).weight_decay == 0.01
    assert build_optimizer(config("adamw", optimizer_config={"adamw": None})).weight_decay == 0.01


def test_a_schedule_with_warmup_takes_the_place_of_the_rate():
    schedule = {"name": "cosine_decay", "arguments": [1e-2, 100], "warmup": 4, "warmup_init": 0.0}
    model, optimizer = make_model(), build_optimizer(config(lr_schedule=schedule))
    rates = []
    for step in range(5):
        update(model, optimizer, random_gradients(model, step))
        rates.append(optimizer.learning_rate.item())
    assert rates == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01])


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine_decay"},
        {"name": "no_such_decay", "arguments": [1e-2]},
        {"name": "cosine_decay", "arguments": []},
        {"name": "cosine_decay", "arguments": [1e-2]},
        {"name": "cosine_decay", "arguments": ["a", "b"]},
        {"arguments": [1e-2, 10]},
        {"name": "math", "arguments": [1e-2, 10]},
    ],
)
def test_a_schedule_that_cannot_be_built(schedule):
    with pytest.raises(EdgeLoraError, match=r"lr_schedule: got \{.*expected name, the list"):
        build_optimizer(config(lr_schedule=schedule))


def test_arguments_that_the_optimizer_refuses():
    arguments = {"adamw": {"momentum": 0.9}}
    with pytest.raises(
        EdgeLoraError, match=r"optimizer_config\.adamw: got .*AdamW refuses .*moment"
    ):
        build_optimizer(config(optimizer_config=arguments))


def test_an_unknown_optimizer():
    with pytest.raises(EdgeLoraError, match="optimizer: got 'lion', expected one of adam, adamw"):
        build_optimizer(config("lion"))
