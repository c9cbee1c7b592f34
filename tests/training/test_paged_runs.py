"""Whole runs with paged adapters: file by file what runs with resident ones give."""

import importlib
import re
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from harness import randomize
from mlx.utils import tree_flatten
from tiny import make_data, make_model, run_options
from training_helpers import PlainEngine, Recorder, make_rows
from training_helpers import make_model as plain_model

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.engine.optimizer import build_optimizer
from mlx_edgelora.training.loop import train

module = importlib.import_module("mlx_edgelora.training.finetune")
WEIGHTS = "adapters.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model", num_hidden_layers=3)
    make_data(root / "data", rows=9)
    return root


@pytest.fixture
def run(tiny, tmp_path):
    """run(adapters, **changes) -> losses, lines and adapter folder of a run."""

    def make(adapters, name=None, **changes):
        folder = tmp_path / (name or adapters)
        config = run_options(tiny, tmp_path) | {
            "adapter_path": str(folder),
            "adapters": adapters,
            "num_layers": 2,
            "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.1},
            "iters": 5,
            "learning_rate": 1e-2,
            "optimizer": "adamw",
            "val_batches": TrainConfig.val_batches,
            "steps_per_report": 1,
            "save_every": 2,
            "kernel": "dequantize",
        }
        recorder, lines = Recorder(), []
        finetune(TrainConfig.from_dict(config | changes), [recorder], lines.append)
        losses = [info["train_loss"] for info in recorder.train]
        return losses + [info["val_loss"] for info in recorder.val], lines, folder

    return make


def choices(lines):
    """What is told of a run, but for what the homes differ in, and for seconds."""
    logged = [line for line in lines if not line.startswith(("plan", "model", "scratch"))]
    return [re.sub(r"\d+\.\d s\b", "some s", line) for line in logged]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


RUNS = [
    {},
    {"grad_accumulation_steps": 3, "max_grad_norm": 0.05},
    {"optimizer": "adafactor", "max_grad_norm": 0.05},
    {"optimizer": "muon", "lr_schedule": {"name": "linear_schedule", "arguments": [1e-2, 0.0, 5]}},
    {"lora_parameters": {"rank": 4, "keys": ["self_attn.v_proj", "model.embed_tokens"]}},
    {"weights": "resident", "activations": "ram", "dtype": "bfloat16"},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_run_is_the_resident_one_bit_for_bit(run, changes):
    if changes.get("activations") == "ram":
        expected, _, kept = run("resident", spill_dir=None, **changes)
    else:
        expected, _, kept = run("resident", **changes)
    got, _, folder = run("paged", **changes)
    assert got == expected
    assert files(folder) == files(kept)
    assert len(files(kept)) == 3


@pytest.mark.slow
def test_resuming_and_testing_go_through_the_file(run):
    _, _, start = run("resident", "start")
    changes = {"resume_adapter_file": str(start / WEIGHTS), "iters": 2, "train": True, "test": True}
    changes["verbose"] = True
    expected, said, kept = run("resident", **changes)
    got, logged, folder = run("paged", **changes)
    assert got == expected
    assert choices(logged) == choices(said)  # for the walk among them
    assert files(folder) == files(kept) != files(start)
    assert any("adapters            in memory" in line for line in said)
    assert any("adapters            in a file" in line for line in logged)
    assert f"scratch files in {folder.parent} (set by --spill-dir)" in logged
    again = [
        run(adapters, "paged", train=False, test=True)[1][-1] for adapters in ("resident", "paged")
    ]
    assert again == [logged[-1]] * 2


def test_clipping_changes_a_run(run):
    free, _, _ = run("paged", optimizer="sgd")
    clipped, _, _ = run("paged", "clipped", optimizer="sgd", max_grad_norm=1e-6)
    assert free[0] == clipped[0]
    assert free[4] != clipped[4]


def test_a_damaged_adapter_to_resume_from_leaves_nothing_behind(run, tmp_path):
    _, _, start = run("paged", "start")
    weights = mx.load(str(start / WEIGHTS))
    name = sorted(weights)[-1]
    weights[name] = mx.full(weights[name].shape, float("nan"))
    mx.save_safetensors(str(tmp_path / "bad.safetensors"), weights)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EdgeLoraError, match=f"{name} holds NaN"):
        run("paged", resume_adapter_file=str(tmp_path / "bad.safetensors"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_gradient_that_is_not_finite_changes_nothing(run, monkeypatch):
    """The last block's gradients are in the file already when the first one's turn out bad."""
    seen = {}

    def spoiled(engine, *rest, **options):
        original = engine.backward

        def backward(batch, sink):
            def spoil(gradients):
                for name in gradients:
                    if ".1." in name and name.endswith("v_proj.lora_b"):
                        gradients[name] = gradients[name] * float("inf")
                sink(gradients)

            return original(batch, spoil)

        engine.backward = backward
        seen["before"] = dict(engine.adapters.weights())
        try:
            return train(engine, *rest, **options)
        finally:
            seen["after"] = dict(engine.adapters.weights())

    monkeypatch.setattr(module, "train", spoiled)
    with pytest.raises(
        EdgeLoraError, match=r"step 1: the gradient of model\.layers\.1\..*v_proj.lora_b holds NaN"
    ):
        run("paged")
    assert all(mx.array_equal(seen["after"][name], v) for name, v in seen["before"].items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adapters": "disk"}, r"adapters: got 'disk', expected one of resident, paged"),
        ({"max_grad_norm": 0}, r"max_grad_norm: got 0, expected a number above 0"),
        ({"max_grad_norm": float("inf")}, r"max_grad_norm: got inf, expected a number above 0"),
        (
            {"activations": "ram", "adapters": "resident", "spill_dir": "x"},
            r"spill_dir: got 'x' with activations ram and adapters resident, which write no file",
        ),
    ],
)
def test_options_that_are_refused(options, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        TrainConfig.from_dict(options)


def test_a_folder_for_paged_adapters_alone_is_none_too_many():
    config = TrainConfig(activations="ram", adapters="paged", spill_dir="x", max_grad_norm=1)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.max_grad_norm == 1.0


# The loop, whatever the home


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="such a gradient is found before, there")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_norm_that_is_not_finite_ends_the_run(make_config, quiet, optimizer):
    engine = PlainEngine(plain_model())
    plain = engine.value_and_grad

    def huge(batch):
        result, gradients = plain(batch)
        layer = gradients["model"]["layers"][0]["self_attn"]["q_proj"]
        layer["lora_b"] = mx.full(layer["lora_b"].shape, 1e25)
        return result, gradients

    engine.value_and_grad = huge
    start = dict(engine.adapters.weights())
    config = make_config(max_grad_norm=1.0, optimizer=optimizer)
    with pytest.raises(EdgeLoraError, match=r"step 1: the norm of the gradients is inf, .*no adap"):
        train(engine, build_optimizer(config), config, make_rows(8, 16), progress=quiet)
    assert all(mx.array_equal(engine.adapters.weights()[name], v) for name, v in start.items())


@pytest.mark.parametrize("steps", [1, 2])
def test_the_mean_of_accumulated_gradients_is_clipped(make_config, quiet, steps):
    config = make_config(
        iters=2, grad_accumulation_steps=steps, max_grad_norm=0.01, optimizer="sgd", batch_size=2
    )
    model, other = plain_model(), plain_model()
    randomize(model)
    randomize(other)
    reference, optimizer, kept = PlainEngine(model), build_optimizer(config), []
    engine = PlainEngine(other)
    plain = engine.value_and_grad

    def spy(batch):
        kept.append(reference.value_and_grad(batch)[1])
        if len(kept) == steps:
            flat = [dict(tree_flatten(tree)) for tree in kept]
            mean = {name: sum(part[name] for part in flat) / steps for name in flat[0]}
            clipped, norm = optimizers.clip_grad_norm(mean, config.max_grad_norm)
            assert norm.item() > 2 * config.max_grad_norm
            optimizer.learning_rate = config.learning_rate
            values = dict(tree_flatten(model.trainable_parameters()))
            model.load_weights(
                [(name, v - config.learning_rate * clipped[name]) for name, v in values.items()],
                strict=False,
            )
            kept.clear()
        return plain(batch)

    engine.value_and_grad = spy
    train(engine, build_optimizer(config), config, make_rows(8, 16), progress=quiet)
    for name, value in tree_flatten(model.trainable_parameters()):
        got = engine.adapters.weights()[name]
        assert mx.allclose(got, value, rtol=1e-6, atol=1e-9), name


class Interrupted(optimizers.SGD):
    """An interrupt in the middle of the third update."""

    calls = 0

    def apply_single(self, gradient, parameter, state):
        self.calls += 1
        if self.calls == 2 * 28 + 10:
            raise KeyboardInterrupt
        return super().apply_single(gradient, parameter, state)


def test_half_an_update_is_never_saved(make_config, quiet):
    config = make_config(iters=9, save_every=2)
    engine = PlainEngine(plain_model())
    assert len(engine.adapters.weights()) == 28
    with pytest.raises(KeyboardInterrupt):
        train(engine, Interrupted(0.1), config, make_rows(8, 16), progress=quiet)
    folder = Path(config.adapter_path)
    assert files(folder)[WEIGHTS] == files(folder)[f"0000002_{WEIGHTS}"]
    assert "interrupted; the last good adapter, of step 2, is in" in quiet._lines.getvalue()
