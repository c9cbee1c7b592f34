from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from backends import frees_at_once
from mlx.utils import tree_flatten, tree_map
from training_helpers import make_model

from mlx_edgelora.config import OPTIMIZERS
from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.optimizer import BlockUpdate, average, build_optimizer, group_by_block
from mlx_edgelora.engine.paged_adapters import PagedAdapterState
from mlx_edgelora.errors import EdgeLoraError

SETTINGS = {
    "adam": {"bias_correction": True},
    "adamw": {"weight_decay": 0.1, "betas": [0.8, 0.9]},
    "muon": {},
    "sgd": {"momentum": 0.9},
    "adafactor": {},
}


def config(optimizer="adamw", **changes):
    values = {"learning_rate": 1e-2, "lr_schedule": None, "optimizer_config": SETTINGS}
    values["loraplus_lr_ratio"] = None
    return SimpleNamespace(optimizer=optimizer, **{**values, **changes})


def random_gradients(model, step):
    key = mx.random.key(step)
    return tree_map(
        lambda p: mx.random.normal(p.shape, key=key) + 0.0 * p, model.trainable_parameters()
    )


def flat(tree):
    return dict(tree_flatten(tree))


def plain_steps(optimizer, steps):
    """Parameters and all that the optimizer remembers after `optimizer.update`, by name."""
    model = make_model()
    for step in range(steps):
        optimizer.update(model, random_gradients(model, step))
        mx.eval(model.parameters(), optimizer.state)
    return flat(model.trainable_parameters()), flat(optimizer.state)


def block_steps(optimizer, steps, compiled, factor=None):
    """The same by blocks, whose names are those inside them."""
    model = make_model()
    update, states = BlockUpdate(optimizer, compiled), {}
    parameters = flat(model.trainable_parameters())
    for step in range(steps):
        gradients = flat(random_gradients(model, step))
        update.begin()
        for names in group_by_block(parameters).values():
            local = {name.split(".", 3)[-1]: name for name in names}  # model.layers.0. before it
            given = (
                {short: source.get(name, {}) for short, name in local.items()}
                for source in (gradients, parameters, states)
            )
            updated, after = update.apply(*given, factor)
            mx.eval(updated, after)
            parameters |= {local[short]: value for short, value in updated.items()}
            states |= {local[short]: value for short, value in after.items()}
    return parameters, flat(optimizer.state) | flat(states)


@pytest.mark.parametrize("name", SETTINGS)
def test_blockwise_update_is_the_plain_one_bit_for_bit(name):
    start = flat(make_model().trainable_parameters())
    every = plain_steps(build_optimizer(config(name)), 3)
    for expected, got in zip(
        every, block_steps(build_optimizer(config(name)), 3, False), strict=True
    ):
        assert got.keys() == expected.keys()
        assert all(mx.array_equal(got[key], expected[key]) for key in expected)
    assert not any(mx.array_equal(every[0][key], value) for key, value in start.items())


SCHEDULE = {"name": "linear_schedule", "arguments": [1e-2, 1e-3, 4]}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schedule", [None, SCHEDULE])
def test_loraplus_gives_every_b_its_own_rate(schedule, compiled, compiles):
    def pair(**changes):
        return build_optimizer(config("adamw", lr_schedule=schedule, **changes))

    faster = {"learning_rate": 0.16, "lr_schedule": schedule}
    if schedule is not None:
        faster["lr_schedule"] = schedule | {"arguments": [0.16, 0.016, 4]}
    both = [build_optimizer(config("adamw", **faster)), pair()]
    plain = optimizers.MultiOptimizer(both, [lambda name, _: name.endswith("lora_b")])
    expected, _ = plain_steps(plain, 3)
    got, _ = block_steps(pair(loraplus_lr_ratio=16.0), 3, compiled)
    assert_near(got, expected)
    same, _ = plain_steps(pair(), 3)
    for name, value in expected.items():
        assert mx.array_equal(value, same[name]) == name.endswith("lora_a"), name


def test_loraplus_gives_vectors_the_rate_of_b():
    update = BlockUpdate(build_optimizer(config("sgd", loraplus_lr_ratio=16.0)), False)
    update.begin()
    ones = {"q.m": mx.ones(3), "q.lora_a": mx.ones((2, 3))}
    updated, _ = update.apply(ones, ones, {}, None)
    assert mx.allclose(updated["q.m"], mx.array(1 - 0.16))
    assert mx.allclose(updated["q.lora_a"], mx.array(1 - 0.01))


def assert_near(got, expected):
    """Every array within 1e-6 of its norm: compiled, a fused operation may round otherwise."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        if mx.issubdtype(value.dtype, mx.integer):
            assert mx.array_equal(got[name], value), name
        else:
            assert mx.linalg.norm(got[name] - value) <= 1e-6 * mx.linalg.norm(value), name


# Half a minute of a C++ compiler, on a CPU that has not got their kernels yet.
MANY_KERNELS = {"adafactor", "muon"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in MANY_KERNELS else []) for n in OPTIMIZERS],
)
def test_compiled_it_is_the_plain_update(name, compiles):
    """Steps and a scheduled rate are arguments: as constants they would be those of the first."""
    plain, ours = (build_optimizer(config(name, lr_schedule=SCHEDULE)) for _ in range(2))
    expected, got = plain_steps(plain, 3), block_steps(ours, 3, True)
    assert ours.step.item() == 3
    for some, others in zip(got, expected, strict=True):
        assert_near(some, others)


def test_compiled_a_factor_is_an_argument(compiles):
    got = [
        block_steps(build_optimizer(config("sgd")), 3, compiled, factor=mx.array(0.25))[0]
        for compiled in (True, False)
    ]
    assert_near(*got)
    assert_near(got[0], block_steps(quarter_of_the_gradients(), 3, False)[0])


def quarter_of_the_gradients():
    optimizer = build_optimizer(config("sgd"))
    apply = optimizer.apply_single
    optimizer.apply_single = lambda gradient, *rest: apply(0.25 * gradient, *rest)
    return optimizer


def counted(optimizer):
    """How often an array's arithmetic is written down in Python."""
    apply, calls = optimizer.apply_single, []
    optimizer.apply_single = lambda *args: calls.append(1) or apply(*args)
    return calls


def test_blocks_of_one_kind_share_one_trace(compiles):
    """Of four matrices in each of two blocks, whichever step it is."""
    optimizer = build_optimizer(config(lr_schedule=SCHEDULE))
    calls = counted(optimizer)
    block_steps(optimizer, 3, True)
    one = len(flat(make_model(blocks=1).trainable_parameters()))
    assert len(calls) == one > 1
    calls.clear()
    block_steps(build_optimizer(config()), 3, True)
    assert calls == []


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
def test_in_either_home_blocks_of_one_kind_share_one_trace(paged, compiles, tmp_path):
    model, optimizer = make_model(blocks=3), build_optimizer(config())
    trained = (
        PagedAdapterState(model, tmp_path, compiled=True)
        if paged
        else ResidentAdapterState(model, True)
    )
    calls = counted(optimizer)
    trained.start(optimizer)
    for step in range(3):
        keys = mx.random.split(mx.random.key(step), 100)
        shapes = {name: value.shape for name, value in trained.weights().items()}
        gradients = {
            n: mx.random.normal(s, key=key)
            for (n, s), key in zip(shapes.items(), keys, strict=False)
        }
        mx.eval(gradients)
        for names in group_by_block(shapes).values():
            trained.add({name: gradients.pop(name) for name in names})
        trained.update(optimizer, 1)
    trained.close()
    assert len(calls) == len(shapes) // 3


def test_what_an_update_does_not_see_stays_as_it_was():
    update = BlockUpdate(build_optimizer(config("adam")), False)
    update.begin()
    parameters = {name: mx.ones((2, 2)) for name in "ab"}
    states = {}
    updated, after = update.apply({"a": mx.ones((2, 2))}, parameters, states, None)
    assert (list(updated), list(after), states) == (["a"], ["a"], {})
    assert all((value == 1).all().item() for value in parameters.values())
    before = {name: dict(state) for name, state in after.items()}
    update.apply({"a": mx.ones((2, 2))}, updated, after, None)
    assert all(after["a"][key] is value for key, value in before["a"].items())


def test_gradients_are_averaged_and_let_go():
    for count in (1, 4):
        gradients = {"a": mx.array([4.0, 8.0]), "b": mx.array([2.0]).astype(mx.bfloat16)}
        mean = average(gradients, count)
        assert gradients == {}
        assert mean["a"].tolist() == [4.0 / count, 8.0 / count]
        assert mean["b"].dtype == mx.bfloat16


class Stack(nn.Module):
    def __init__(self, blocks, size):
        super().__init__()
        self.layers = [nn.Linear(size, size, bias=False) for _ in range(blocks)]


def peak_of_update(start):
    blocks, size = 16, 256  # 256 KiB a block
    model, optimizer = Stack(blocks, size), build_optimizer(config())
    apply = start(model, optimizer)
    for _ in range(2):
        gradients = tree_map(mx.ones_like, model.trainable_parameters())
        mx.eval(model.parameters(), gradients)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        apply(gradients)
        del gradients
    return (mx.get_peak_memory() - before) / (4 * size * size)


@frees_at_once
def test_update_peaks_at_a_few_arrays_whatever_the_depth():
    def by_blocks(model, optimizer):
        trained = ResidentAdapterState(model)
        trained.start(optimizer)

        def apply(gradients):
            names = flat(gradients)
            gradients.clear()
            trained.add(names)
            trained.update(optimizer, 1)

        return apply

    def at_once(model, optimizer):
        def apply(gradients):
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)

        return apply

    assert peak_of_update(by_blocks) < 8
    assert peak_of_update(at_once) > 12  # the measure sees what the blocks save


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
    trained = ResidentAdapterState(model)
    trained.start(optimizer)
    for step in range(5):
        trained.add(flat(random_gradients(model, step)))
        trained.update(optimizer, 1)
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
        EdgeLoraError, match=r"optimizer_config\.adamw: got .*AdamW.*rejects .*moment"
    ):
        build_optimizer(config(optimizer_config=arguments))


def test_an_unknown_optimizer():
    with pytest.raises(EdgeLoraError, match="optimizer: got 'lion', expected one of adam, adamw"):
        build_optimizer(config("lion"))
