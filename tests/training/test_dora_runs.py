"""DoRA from end to end: the steps, files and logits of mlx-lm."""

import dataclasses

import architectures
import mlx.core as mx
import pytest
import side_by_side
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from peaks import held
from side_by_side import (
    assert_mlx_lm_can_hand_over,
    assert_same_run,
    logits,
    recast,
    run,
    weights,
)
from tiny import make_data, make_model

from mlx_edgelora import EdgeLoraError, finetune
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


def options(folder, model, data, /, **changes):
    dora = {
        "fine_tune_type": "dora",
        "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0},
    }
    return side_by_side.options(folder, model, data, **dora | changes)


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
    assert_mlx_lm_can_hand_over(tiny(steps_per_eval=20), tmp_path)


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
