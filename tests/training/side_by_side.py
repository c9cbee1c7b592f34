"""Whole runs here and in mlx-lm, with the same options."""

import dataclasses
import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import evaluate
from tiny import run_options
from training_helpers import Recorder

from mlx_edgelora import TrainConfig, finetune


def options(folder, model, data, /, **changes):
    """The options of a run whose weights are streamed and whose inputs of blocks are spilled."""
    return TrainConfig.from_dict(
        run_options(folder, folder)
        | {
            "model": str(model),
            "data": str(data),
            "cache_dir": str(folder / "cache"),
            "batch_size": 3,
            "iters": 20,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
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


def mlx_lm_test_loss(config, **options):
    """What mlx-lm's own evaluation says of the test set, on a model as `load` opens it."""
    model, tokenizer = load(config.model, **options)
    args = SimpleNamespace(**(mlx_lm_lora.CONFIG_DEFAULTS | config.to_dict()))
    _, _, rows = load_dataset(args, tokenizer)
    return evaluate(model, CacheDataset(rows), config.batch_size, -1, config.max_seq_length)


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


def assert_mlx_lm_can_hand_over(config, folder):
    """What mlx-lm trained is tested and trained further here, as mlx-lm itself does it."""
    run_mlx_lm(config, folder / "theirs")
    adapter = str(folder / "theirs")
    tested = dataclasses.replace(
        config, train=False, test=True, adapter_path=adapter, fine_tune_type="lora"
    )
    lines = []
    finetune(tested, [], lines.append)
    loss = mlx_lm_test_loss(config, adapter_path=adapter)
    assert any(f"test loss {loss:.3f}" in line for line in lines), (loss, lines)
    further = dataclasses.replace(config, resume_adapter_file=f"{adapter}/adapters.safetensors")
    losses = run(further)
    expected = run_mlx_lm(further, folder / "further")
    assert np.abs(np.subtract(losses, expected)).max() < 1e-4


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
