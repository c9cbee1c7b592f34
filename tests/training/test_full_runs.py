"""Full fine-tuning from end to end: the steps, files and logits of mlx-lm."""

import contextlib
import dataclasses
import io

import mlx.core as mx
import numpy as np
import pytest
import side_by_side
from mlx_lm import load
from mlx_lm.utils import dequantize_model, save
from side_by_side import (
    assert_mlx_lm_can_hand_over,
    assert_same_run,
    logits,
    recast,
    run,
    run_mlx_lm,
    weights,
)
from tiny import make_adapter, make_data, make_model

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.blocks import norms
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.export.fusing import fuse
from mlx_edgelora.inference.streamed import open_lazy, plan_inference, streamed
from mlx_edgelora.training.opening import open_engine
from mlx_edgelora.training.verification import verify

SMALLEST = {"memory_budget": "min", "activations": None}


@pytest.fixture
def tiny(tmp_path):
    """tiny(name, **changes) -> options of a run on a tiny random model."""

    def make(name="llama", quantized=False, blocks=3, **changes):
        model = make_model(tmp_path / "model", name, quantized, num_hidden_layers=blocks)
        data = make_data(tmp_path / "data", rows=12)
        return side_by_side.options(tmp_path, model, data, fine_tune_type="full", **changes)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_twenty_steps_are_those_of_mlx_lm(tiny, tmp_path, name):
    assert_same_run(tiny(name, **SMALLEST), tmp_path)


@pytest.mark.slow
def test_the_last_blocks_alone_are_trained(tiny, tmp_path):
    assert_same_run(tiny("qwen3", num_layers=2, adapters="resident"), tmp_path)
    assert {name.split(".")[2] for name in weights(tmp_path / "adapters")} == {"1", "2"}


@pytest.mark.slow
def test_twenty_steps_on_the_embedded_model(tmp_path):
    model, tokenizer, config = load(str(MODEL_PATH), return_config=True)
    with contextlib.redirect_stdout(io.StringIO()):
        dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    save(tmp_path / "model", MODEL_PATH, model, tokenizer, config)
    # Every row is longer than that: mlx-lm then sorts rows as they are sorted here.
    changes = {"max_seq_length": 20, "batch_size": 4, "fine_tune_type": "full"}
    changes["learning_rate"] = 2e-4
    config = side_by_side.options(tmp_path, tmp_path / "model", DATA_PATH, **changes)
    assert_same_run(config, tmp_path)


@pytest.mark.slow
def test_sixteen_bits_stay_sixteen_bits(tiny, tmp_path):
    config = tiny(**SMALLEST)
    recast(config.model, mx.bfloat16)
    losses, expected = run(config), run_mlx_lm(config, tmp_path / "theirs")
    assert np.abs(np.subtract(losses, expected)).max() < 0.05  # three digits in each product
    got, wanted = weights(tmp_path / "adapters"), weights(tmp_path / "theirs")
    assert {n: v.dtype for n, v in got.items()} == dict.fromkeys(wanted, mx.bfloat16)


@pytest.mark.slow
def test_another_dtype_is_that_of_the_trained_weights(tiny, tmp_path):
    config = tiny(dtype="float32", **SMALLEST)
    recast(config.model, mx.bfloat16)
    run(dataclasses.replace(config, iters=2))
    assert {v.dtype for v in weights(tmp_path / "adapters").values()} == {mx.float32}


def test_mlx_lm_and_fuse_and_generate_load_what_was_trained_here(tiny, tmp_path):
    config = tiny(blocks=8, num_layers=7, iters=2)
    run(config)
    folder = tmp_path / "adapters"
    trained, _ = load(config.model, adapter_path=str(folder))
    base, _ = load(config.model)
    expected = logits(trained)
    assert mx.abs(expected - logits(base)).max().item() > 1e-2
    fused = fuse(None, [folder], tmp_path / "fused", notify=str)
    assert mx.array_equal(logits(load(str(fused))[0]), expected)
    lazy = open_lazy(config.model, folder, tmp_path / "cache")
    before = mx.get_active_memory()
    with contextlib.closing(streamed(lazy, plan_inference(lazy, "min", 1, 12))) as model:
        got = model(mx.arange(3, 15)[None])  # `logits` would call the model inside
        assert mx.abs(got - expected).max().item() < 1e-5
        held = mx.get_active_memory() - before
    blocks = sum(value.nbytes for value in weights(folder).values())
    assert held < blocks / 2  # what was trained is read block by block as well


@pytest.mark.slow
def test_what_mlx_lm_trained_is_tested_and_trained_further_here(tiny, tmp_path):
    assert_mlx_lm_can_hand_over(tiny(**SMALLEST), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_interrupted_run_goes_on_exactly(tiny, tmp_path, dtype):
    changes = SMALLEST | {"iters": 4, "save_every": 2, "grad_accumulation_steps": 3}
    whole = tiny(adapter_path=str(tmp_path / "whole"), max_grad_norm=1.0, **changes)
    recast(whole.model, dtype)
    run(whole)
    place = str(tmp_path / "whole/checkpoints/0000002")  # with accumulated gradients
    other = {"adapter_path": str(tmp_path / "half"), "overwrite": False}
    run(dataclasses.replace(whole, resume=place, **other))
    got, expected = weights(tmp_path / "half"), weights(tmp_path / "whole")
    for name, value in expected.items():
        assert mx.array_equal(got[name], value), name


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="there the norm is MLX's own")
def test_verify_compares_all_weights_and_finds_a_wrong_one(tiny, monkeypatch):
    with open_engine(tiny(**SMALLEST), str) as (engine, _, _):
        assert not any(verdict.problem for verdict in verify(engine, 2, 24))
        monkeypatch.setattr(norms, "rms_norm", doubled_gradient(norms.rms_norm))
        problems = [verdict.problem for verdict in verify(engine, 2, 24, light=True)]
    assert any("norm.weight is 1.0e+00 of its norm off" in problem for problem in problems)


def doubled_gradient(norm):
    return lambda x, weight, *args, **kwargs: norm(
        x, 2 * weight - mx.stop_gradient(weight), *args, **kwargs
    )


def refused(config, sentence):
    with pytest.raises(EdgeLoraError, match=sentence) as caught:
        finetune(config, [], str)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_trained_is_refused(tiny, tmp_path):
    config = tiny(quantized=True)
    refused(config, r"full cannot train .*up_proj of block 0, which is quantized to 4 bits; name")
    refused(dataclasses.replace(config, num_layers=4), r"got 4, but the model has 3 blocks")
    file = make_adapter(tmp_path / "lora", tmp_path / "model") / "adapters.safetensors"
    config = dataclasses.replace(tiny(), resume_adapter_file=str(file))
    refused(config, r"lacks .*weight and 24 more and has .*lora_a.*, not in this model; resume")


def test_a_file_of_more_blocks_is_refused(tiny, tmp_path):
    config = tiny(iters=1, **SMALLEST)
    run(config)
    file = str(tmp_path / "adapters/adapters.safetensors")
    refused(
        dataclasses.replace(config, resume_adapter_file=file, num_layers=1),
        r"does not fit: has model\.layers\.0\..*, not in this model; resume with .* num_layers",
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantize": 4}, r"quantize: got 4 with .* full, which cannot train quantized weights"),
        ({"lora_preset": "mlp"}, r"lora_preset: got 'mlp' with fine_tune_type full, .* leave it"),
        ({"lora_parameters": {"rank": 4}}, r"lora_parameters\.rank: got 4 with .* leave it out"),
        ({"loraplus_lr_ratio": 16}, r"loraplus_lr_ratio: got 16\.?0? with fine_tune_type full"),
    ],
)
def test_options_of_adapters_are_refused(changes, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        TrainConfig.from_dict({"fine_tune_type": "full"} | changes)
