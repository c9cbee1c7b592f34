"""Whole runs here and in mlx-lm, with the same options."""

import dataclasses
import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner.datasets import load_dataset
from tiny import LENGTH
from training_helpers import Recorder

from mlx_edgelora import TrainConfig, finetune


def options(folder, model, data, **changes):
    """The options of a run whose weights are streamed and whose inputs of blocks are spilled."""
    return TrainConfig.from_dict(
        {
            "model": str(model),
            "data": str(data),
            "adapter_path": str(folder / "adapters"),
            "spill_dir": str(folder),
            "cache_dir": str(folder / "cache"),
            "num_layers": -1,
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
    """The losses of a run."""
    recorder = Recorder()
    finetune(config, [recorder], lambda line: None)
    return [report["train_loss"] for report in recorder.train]


def run_mlx_lm(config, folder):
    """The losses of the same run by mlx-lm, which saves to `folder`."""
    config = dataclasses.replace(config, adapter_path=str(folder))
    args = SimpleNamespace(**(mlx_lm_lora.CONFIG_DEFAULTS | config.to_dict()))
    recorder = Recorder()
    np.random.seed(args.seed)
    model, tokenizer = load(args.model)
    train_set, valid_set, _ = load_dataset(args, tokenizer)
    mlx_lm_lora.train_model(args, model, train_set, valid_set, recorder)
    return [report["train_loss"] for report in recorder.train]


def weights(folder):
    """The arrays of an adapter folder by name."""
    return mx.load(str(folder / "adapters.safetensors"))


def logits(model):
    return model.eval()(mx.arange(3, 15)[None]).astype(mx.float32)


def recast(model, dtype):
    """Write a checkpoint again in another dtype."""
    file = f"{model}/model.safetensors"
    arrays = mx.load(file)
    cast = {n: v if v.dtype == mx.uint32 else v.astype(dtype) for n, v in arrays.items()}
    mx.eval(cast)
    mx.save_safetensors(file, cast, {"format": "mlx"})


def assert_same_run(config, folder):
    """The losses and the files of 20 steps are those of mlx-lm."""
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
