"""One contract for every home of what is trained; what the paged one does to disk and memory."""

import errno
import os
import stat
import sys

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from architectures import add_lora, build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from pairwise import pairwise

from mlx_edgelora.config import OPTIMIZERS
from mlx_edgelora.engine import paged_adapters
from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.optimizer import clip_factor
from mlx_edgelora.engine.paged_adapters import PagedAdapterState
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
KEYS = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]
# All of mlx.optimizers that work array by array, those of the configuration among them.
MAKE = {
    "adam": lambda rate: optimizers.Adam(rate, bias_correction=True),
    "adamw": lambda rate: optimizers.AdamW(rate, weight_decay=0.1),
    "muon": optimizers.Muon,
    "sgd": optimizers.SGD,
    "momentum": lambda rate: optimizers.SGD(rate, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda rate: optimizers.Adafactor(),
    "adafactor with a rate": lambda rate: optimizers.Adafactor(
        rate, beta_1=0.9, relative_step=False, scale_parameter=False
    ),
    "lion": lambda rate: optimizers.Lion(rate, weight_decay=0.1),
    "rmsprop": optimizers.RMSprop,
    "adagrad": optimizers.Adagrad,
    "adadelta": optimizers.AdaDelta,
    "adamax": optimizers.Adamax,
}


def make_model(blocks=3, keys=KEYS, **changes):
    """Two of three blocks adapted, and both ends."""
    mx.random.seed(7)
    model = build("llama", num_hidden_layers=blocks, vocab_size=61, **changes)
    add_lora(model, num_layers=2, keys=keys)
    weights = [
        (name, 0.1 * mx.random.normal(value.shape)) for name, value in parameters(model).items()
    ]
    model.load_weights(weights, strict=False)
    return model


def parameters(model):
    return dict(tree_flatten(model.trainable_parameters()))


HOMES = "resident", "paged", "paged, an array at a time"


@pytest.fixture(params=HOMES)
def home(request, tmp_path, monkeypatch):
    """home(model) -> that model's trained parameters in a home, closed afterwards."""
    made = []
    if request.param == HOMES[2]:
        monkeypatch.setattr(paged_adapters, "PIECE_BYTES", 1)

    def make(model):
        paged = request.param != "resident"
        made.append(PagedAdapterState(model, tmp_path) if paged else ResidentAdapterState(model))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def paged(tmp_path):
    made = PagedAdapterState(make_model(), tmp_path, DiskMeter())
    yield made
    made.close()


def gradients_of(shapes, seed, size=1.0):
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    result = {
        name: size * mx.random.normal(shape, key=key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    mx.eval(result)
    return result


def shapes_of(model):
    return {name: value.shape for name, value in parameters(model).items()}


def give(trained, gradients, *look):
    """As the engine does: the last block first, what lies outside at the end."""
    groups = {}
    for name, value in gradients.items():
        index = name.split("layers.")[1].split(".")[0] if "layers." in name else "-1"
        groups.setdefault(int(index), {})[name] = value
    for index in sorted(groups, reverse=True):
        trained.add(groups[index], *look)
        assert groups[index] == {}


def same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert mx.array_equal(got[name], value), name


def reference_step(model, optimizer, batches, max_norm=None):
    """Plain mlx.optimizers on the mean, clipped by mlx.optimizers; gives the norm."""
    total = batches[0]
    for more in batches[1:]:
        total = tree_map(mx.add, more, total)
    if len(batches) > 1:
        total = tree_map(lambda gradient: gradient / len(batches), total)
    tree, norm = tree_unflatten(list(total.items())), None
    if max_norm is not None:
        tree, norm = optimizers.clip_grad_norm(tree, max_norm)
    optimizer.update(model, tree)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return norm


@pytest.mark.parametrize(
    ("home", "name", "scheduled", "batches", "max_norm"),
    pairwise(HOMES, MAKE, [False, True], [1, 3], [None, 2.0]),
    indirect=["home"],
)
def test_steps_are_those_of_mlx_bit_for_bit(home, name, scheduled, batches, max_norm):
    rate = optimizers.linear_schedule(1e-2, 1e-3, 3) if scheduled else 1e-2
    plain, ours = MAKE[name](rate), MAKE[name](rate)
    model, other = make_model(), make_model()
    start, shapes = parameters(model), shapes_of(model)
    trained = home(other)
    trained.start(ours)
    for step in range(4):
        every = [gradients_of(shapes, 10 * step + i) for i in range(batches)]
        norm = reference_step(model, plain, every, max_norm)
        for gradients in every:
            give(trained, gradients)
        factor = None
        if max_norm is not None:
            got = trained.norm(batches)
            assert got.item() == norm.item() > max_norm
            factor = clip_factor(got, max_norm)
        trained.update(ours, batches, factor)
        assert ours.step.item() == step + 1
        assert (
            mx.array_equal(ours.learning_rate, plain.learning_rate)
            if "learning_rate" in (plain.state)
            else True
        )
    got = trained.weights()
    same(got, parameters(model))
    assert not any(mx.array_equal(got[name], value) for name, value in start.items())


def test_the_optimizers_of_the_configuration_are_among_them():
    made = {type(make(1e-3)) for make in MAKE.values()}
    assert set(OPTIMIZERS.values()) <= made


@settings(deadline=None, max_examples=40)
@given(
    max_norm=st.floats(1e-3, 1e3),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    batches=st.integers(1, 3),
)
def test_clipping_is_that_of_mlx(max_norm, size, batches):
    model = make_model()
    trained = ResidentAdapterState(model)
    every = [gradients_of(shapes_of(model), i, size) for i in range(batches)]
    mean = {name: sum(g[name] for g in every) / batches for name in every[0]}
    expected, norm = optimizers.clip_grad_norm(mean, max_norm)
    for gradients in every:
        give(trained, gradients)
    got = trained.norm(batches)
    assert got.item() == pytest.approx(norm.item(), rel=1e-6)
    factor = clip_factor(got, max_norm).item()
    name = "lm_head.lora_b"
    assert mx.allclose(mean[name] * factor, expected[name], rtol=1e-5, atol=0)


def test_gradients_below_the_norm_are_left_alone(home):
    model, other = make_model(), make_model()
    plain, ours = optimizers.SGD(0.1), optimizers.SGD(0.1)
    trained = home(other)
    trained.start(ours)
    gradients = gradients_of(shapes_of(model), 0)
    reference_step(model, plain, [gradients])
    give(trained, gradients)
    trained.update(ours, 1, clip_factor(trained.norm(1), 1e4))
    same(trained.weights(), parameters(model))


def test_values_are_loaded_and_given(home):
    model = make_model()
    values = gradients_of(shapes_of(model), 3)
    trained = home(model)
    trained.load(values.items())
    got = trained.weights()
    same(got, values)
    assert len(got) == len(values)
    with pytest.raises(KeyError):
        got["model.layers.0.self_attn.q_proj.lora_a"]  # a block that is not adapted


def test_the_sums_are_shown_as_they_grow(home):
    model = make_model()
    trained, total = home(model), {}
    trained.start(optimizers.SGD(0.1))
    for seed in range(2):
        more, shown = gradients_of(shapes_of(model), seed), {}
        total = {name: value + total[name] if total else value for name, value in more.items()}
        give(trained, more, lambda sums, shown=shown: shown.update(copied(sums)))
        assert shown.keys() == total.keys()
        assert all(np.array_equal(shown[name], np.array(total[name])) for name in total)


def copied(arrays):
    return {name: np.array(array) for name, array in arrays.items()}


def test_a_start_forgets_what_was_summed(home):
    model, other = make_model(), make_model()
    shapes, optimizer = shapes_of(model), optimizers.Adam(0.1)
    trained = home(other)
    trained.start(optimizers.SGD(0.1))
    give(trained, gradients_of(shapes, 1))
    trained.start(optimizer)
    gradients = gradients_of(shapes, 2)
    reference_step(model, optimizers.Adam(0.1), [gradients])
    give(trained, gradients)
    trained.update(optimizer, 1)
    same(trained.weights(), parameters(model))


def test_how_a_gradient_lies_in_memory_does_not_matter(tmp_path):
    """The order of a sum follows it, so bits of the norm would differ between the homes."""
    models = [make_model(), make_model()]
    homes = [ResidentAdapterState(models[0]), PagedAdapterState(models[1], tmp_path)]
    shapes, norms = shapes_of(models[0]), ([], [])
    for trained, seen in zip(homes, norms, strict=True):
        for seed in range(20):  # one sum may come out the same by chance
            trained.start(optimizers.SGD(0.1))
            gradients = gradients_of({n: s[::-1] for n, s in shapes.items()}, seed)
            give(trained, {name: value.T for name, value in gradients.items()})
            seen.append(trained.norm(1).item())
    assert norms[0] == norms[1]
    homes[1].close()


class Broken(optimizers.SGD):
    """Ends the second block's update, as an interrupt at that moment does."""

    calls = 0

    def apply_single(self, gradient, parameter, state):
        self.calls += 1
        if self.calls == 11:
            raise KeyboardInterrupt
        return super().apply_single(gradient, parameter, state)


def test_half_an_update_is_never_given(home):
    model = make_model()
    shapes, trained, optimizer = shapes_of(model), home(model), Broken(0.1)
    assert len(shapes) == 12
    trained.start(optimizer)
    give(trained, gradients_of(shapes, 0))
    with pytest.raises(KeyboardInterrupt):
        trained.update(optimizer, 1)
    for use in (trained.weights, lambda: trained.update(optimizer, 1)):
        with pytest.raises(
            EdgeLoraError, match=r"update of the adapters was interrupted.*; resume from"
        ):
            use()


# The file


def test_half_an_update_is_never_walked_on(paged):
    optimizer = Broken(0.1)
    paged.start(optimizer)
    give(paged, gradients_of({n: v.shape for n, v in paged.weights().items()}, 0))
    with pytest.raises(KeyboardInterrupt):
        paged.update(optimizer, 1)
    with pytest.raises(EdgeLoraError, match="update of the adapters was interrupted"):
        paged.block(2)


def test_blocks_are_given_by_their_local_names(tmp_path):
    model = make_model()
    expected = parameters(model)
    trained = PagedAdapterState(model, tmp_path)
    trained.prefetch(0)
    assert trained.block(0) == {}
    for index in (1, 2):
        prefix = f"model.layers.{index}."
        trained.prefetch(index)
        local = {n[len(prefix) :]: v for n, v in expected.items() if n.startswith(prefix)}
        same(trained.block(index), local)
    trained.close()


def test_placeholders_cost_nothing_and_are_no_values(memory, tmp_path):
    model = make_model(hidden_size=256, intermediate_size=512)
    before = parameters(model)
    mx.eval(before)
    inside = sum(v.nbytes for name, v in before.items() if "layers." in name)
    specs = {name: (v.dtype, v.shape) for name, v in before.items()}
    held = mx.get_active_memory()
    del before
    trained = PagedAdapterState(model, tmp_path)
    assert mx.get_active_memory() <= held - inside + 4096
    after = parameters(model)
    assert {name: (v.dtype, v.shape) for name, v in after.items()} == specs
    for name, value in after.items():
        assert mx.isnan(value).all().item() is ("layers." in name)
    trained.close()


@LINUX
def test_file_is_private_and_has_no_name(paged, tmp_path):
    paged.start(optimizers.AdamW(1e-3))
    size = sum(v.nbytes for name, v in paged.weights().items() if "layers." in name)
    descriptor = paged._file.fileno()
    status = os.fstat(descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    # Parameters, gradients and two moments, taken beforehand.
    assert min(status.st_size, 512 * status.st_blocks) >= 4 * size
    paged.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence(paged, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    sentence = r"spilling adapters needs [\d.]+ kB there .*are free.*or use --adapters resident"
    with pytest.raises(EdgeLoraError, match=sentence):
        paged.start(optimizers.AdamW(1e-3))
    model = make_model()
    with pytest.raises(EdgeLoraError, match=sentence):
        PagedAdapterState(model, tmp_path)
    assert not any(mx.isnan(value).any().item() for value in parameters(model).values())


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"missing: no scratch file .*--adapters resident"):
        PagedAdapterState(make_model(), tmp_path / "missing")


def test_bytes_are_counted(paged):
    meter, size = paged._meter, sum(value.nbytes for value in paged.block(2).values())
    read, written = meter.read_bytes, meter.written_bytes
    optimizer = optimizers.Adam(1e-3)
    paged.start(optimizer)
    for _ in range(2):
        shapes = {n: v.shape for n, v in paged.weights().items() if "layers.2." in n}
        start = meter.snapshot()
        give(paged, gradients_of(shapes, 0))
        paged.update(optimizer, 1)
    # One block: its gradients once, its parameters, and two moments.
    assert meter.written_bytes - start.written_bytes == 4 * size
    assert meter.read_bytes - start.read_bytes == 4 * size
    assert (read, written) <= (start.read_bytes, start.written_bytes)


def test_nothing_trained_takes_no_space(tmp_path):
    model = make_model()
    model.freeze()
    trained = PagedAdapterState(model, tmp_path)
    assert os.fstat(trained._file.fileno()).st_size == 0
    assert dict(trained.weights()) == {}
    assert trained.block(1) == {}
    trained.close()
