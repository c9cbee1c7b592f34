"""DoRA from end to end: the steps, files and logits of mlx-lm."""

import dataclasses
import json
from types import SimpleNamespace

import architectures
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.utils import load_adapters
from tiny import LENGTH, make_adapter, make_data, make_model
from training_helpers import Recorder

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
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


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_are_those_of_mlx_lm(tiny, tmp_path, name):
    assert_same_run(tiny(name), tmp_path)


@pytest.mark.parametrize("quantized", [True, False])
def test_paged_adapters_take_the_same_steps(tiny, tmp_path, quantized):
    assert_same_run(tiny("llama", quantized, memory_budget="min", activations=None), tmp_path)
