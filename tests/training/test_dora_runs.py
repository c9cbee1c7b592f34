"""DoRA from end to end: the steps, files and logits of mlx-lm."""

import dataclasses
import json
from types import SimpleNamespace

import architectures
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import evaluate
from mlx_lm.tuner.utils import linear_to_lora_layers
from peaks import held
from tiny import LENGTH, make_data, make_model
from training_helpers import Recorder

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.blocks import lora_layers
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.layers.dora import row_norms
from mlx_edgelora.training.opening import adapted_model, open_engine
from mlx_edgelora.training.verification import verify

# Of each architecture what differs from BASE; Mistral is a Llama with another name.
MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma": {},
    "mistral": {},
}


@pytest.fixture
def tiny(request, tmp_path, monkeypatch):
    """tiny(name, quantized) -> options of a run on a tiny random model."""

    def make(name="qwen3", quantized=True, **changes):
        monkeypatch.setitem(architectures.CONFIGS, "gemma", {})
        kind = {"model_type": "mistral"} if name == "mistral" else {}
        model = make_model(
            tmp_path / "model", "llama" if name == "mistral" else name, quantized, **kind
        )
        return options(tmp_path, model, make_data(tmp_path / "data", rows=12), **changes)

    return make


def options(folder, model, data, **changes):
    return TrainConfig.from_dict(
        {
            "model": str(model),
            "data": str(data),
            "fine_tune_type": "dora",
            "adapter_path": str(folder / "adapters"),
            "spill_dir": str(folder),
            "cache_dir": str(folder / "cache"),
            "num_layers": -1,
            "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0},
            "batch_size": 3,
            "iters": 20,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "max_seq_length": LENGTH,
            "val_batches": 0,
            "steps_per_report": 1,
            "kernel": "dequantize",
            "weights": "streamed",
            "activations": "spill",
            "overwrite": True,
        }
        | changes
    )


def run(config):
    recorder = Recorder()
    finetune(config, [recorder], lambda line: None)
    return [report["train_loss"] for report in recorder.train]


def run_mlx_lm(config, folder):
    """The same run by mlx-lm."""
    config = dataclasses.replace(config, adapter_path=str(folder))
    args = SimpleNamespace(**(mlx_lm_lora.CONFIG_DEFAULTS | config.to_dict()))
    recorder = Recorder()
    np.random.seed(args.seed)
    model, tokenizer = load(args.model)
    train_set, valid_set, _ = load_dataset(args, tokenizer)
    mlx_lm_lora.train_model(args, model, train_set, valid_set, recorder)
    return [report["train_loss"] for report in recorder.train]


def weights(folder):
    return mx.load(str(folder / "adapters.safetensors"))


def logits(model):
    return model.eval()(mx.arange(3, 15)[None]).astype(mx.float32)


def assert_same_run(config, folder):
    losses, expected = run(config), run_mlx_lm(config, folder / "theirs")
    assert len(losses) == len(expected) == 20
    assert np.abs(np.subtract(losses, expected)).max() < 1e-4
    assert expected[-1] < expected[0] - 0.1  # it learns
    got, wanted = weights(folder / "adapters"), weights(folder / "theirs")
    assert {n: (v.shape, v.dtype) for n, v in got.items()} == {
        n: (v.shape, v.dtype) for n, v in wanted.items()
    }
    for name, value in wanted.items():
        error = mx.linalg.norm((got[name] - value).reshape(-1))
        assert error.item() < 1e-3 * mx.linalg.norm(value.reshape(-1)).item(), name
    ours, theirs = (
        json.loads((folder / who / "adapter_config.json").read_text())
        for who in ("adapters", "theirs")
    )
    for key in ("fine_tune_type", "num_layers", "lora_parameters"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    "name",
    [name if name == "qwen3" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_twenty_steps_are_those_of_mlx_lm(tiny, tmp_path, name):
    assert_same_run(tiny(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_paged_adapters_take_the_same_steps(tiny, tmp_path, quantized):
    assert_same_run(tiny("llama", quantized, memory_budget="min", activations=None), tmp_path)


@pytest.mark.slow
def test_twenty_steps_on_the_embedded_model(tmp_path):
    # Every row is longer than that: mlx-lm then sorts rows as they are sorted here.
    config = options(tmp_path, MODEL_PATH, DATA_PATH, max_seq_length=20, batch_size=4)
    assert_same_run(config, tmp_path)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("quantized", [True, False])
def test_the_first_values_are_those_of_mlx_lm(tiny, quantized, dtype):
    config = tiny("llama", quantized)
    recast(config.model, dtype)
    got = dict(tree_flatten(adapted_model(config).model.trainable_parameters()))
    model, _ = load(config.model)
    mx.random.seed(config.seed)
    model.freeze()
    parameters = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=True)
    expected = dict(tree_flatten(model.trainable_parameters()))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype == mx.float32
        assert mx.array_equal(got[name], value), name


def recast(model, dtype):
    """Write a checkpoint again in another dtype."""
    file = f"{model}/model.safetensors"
    arrays = mx.load(file)
    cast = {n: v if v.dtype == mx.uint32 else v.astype(dtype) for n, v in arrays.items()}
    mx.eval(cast)
    mx.save_safetensors(file, cast, {"format": "mlx"})


def test_first_magnitudes_leave_no_weights_in_memory(tiny):
    lazy = adapted_model(tiny("llama", False, num_layers=-1))
    before = held()
    mx.eval(lazy.model.trainable_parameters())
    trained = sum(v.nbytes for _, v in tree_flatten(lazy.model.trainable_parameters()))
    assert held() - before <= 1.1 * trained


@pytest.mark.slow
def test_mlx_lm_loads_what_was_trained_here(tiny, tmp_path):
    config = tiny()
    run(config)
    trained = dataclasses.replace(
        config, resume_adapter_file=str(tmp_path / "adapters/adapters.safetensors")
    )
    with open_engine(dataclasses.replace(trained, weights="resident"), str) as (engine, _, _):
        ours = logits(engine.model)
    model, _ = load(config.model, adapter_path=str(tmp_path / "adapters"))
    base, _ = load(config.model)
    assert mx.abs(ours - logits(model)).max().item() < 1e-4
    assert mx.abs(ours - logits(base)).max().item() > 1e-2


@pytest.mark.slow
def test_what_mlx_lm_trained_is_tested_and_trained_further_here(tiny, tmp_path):
    config = tiny(steps_per_eval=20)
    run_mlx_lm(config, tmp_path / "theirs")
    tested = dataclasses.replace(
        config, train=False, test=True, adapter_path=str(tmp_path / "theirs"), fine_tune_type="lora"
    )
    lines = []
    finetune(tested, [], lines.append)
    model, tokenizer = load(config.model, adapter_path=str(tmp_path / "theirs"))
    args = SimpleNamespace(**(mlx_lm_lora.CONFIG_DEFAULTS | config.to_dict()))
    _, _, test_set = load_dataset(args, tokenizer)
    loss = evaluate(model, CacheDataset(test_set), config.batch_size, -1, LENGTH)
    assert any(f"test loss {loss:.3f}" in line for line in lines), (loss, lines)
    file = str(tmp_path / "theirs/adapters.safetensors")
    further = dataclasses.replace(config, resume_adapter_file=file)
    losses = run(further)
    expected = run_mlx_lm(further, tmp_path / "further")
    assert np.abs(np.subtract(losses, expected)).max() < 1e-4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(tiny, tmp_path):
    whole = tiny(iters=8, save_every=4, adapter_path=str(tmp_path / "whole"))
    run(whole)
    half = dataclasses.replace(whole, iters=4, adapter_path=str(tmp_path / "half"))
    run(half)
    run(dataclasses.replace(half, iters=8, resume=True, overwrite=False, accept_changes=("iters",)))
    got, expected = weights(tmp_path / "half"), weights(tmp_path / "whole")
    for name, value in expected.items():
        assert mx.array_equal(got[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"memory_budget": "min", "activations": None}, {"weights": "resident"}], ids=str
)
def test_verify_compares_with_mlx_lms_layers(tiny, changes):
    config = tiny(**changes)
    with open_engine(config, str) as (engine, _, _):
        assert not any(verdict.problem for verdict in verify(engine, 2, 24))


def test_verify_finds_a_wrong_norm(tiny, monkeypatch):
    monkeypatch.setattr(lora_layers, "row_norms", lambda *args: 1.01 * row_norms(*args))
    with open_engine(tiny(), str) as (engine, _, _):
        assert any(verdict.problem for verdict in verify(engine, 2, 24))


def test_an_adapter_of_another_type_is_refused(tiny, tmp_path):
    config = tiny()
    run(dataclasses.replace(config, iters=1))
    file = str(tmp_path / "adapters/adapters.safetensors")
    other = dataclasses.replace(config, fine_tune_type="lora", resume_adapter_file=file)
    with pytest.raises(EdgeLoraError, match=r"has .*\.m and 18 more, not in this"):
        finetune(other, [], str)
