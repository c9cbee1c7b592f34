"""Adapters for PEFT against the real `peft`, `transformers` and `torch`, on the same weights."""

import importlib
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import BASE, CONFIGS
from families import COMMON, FAMILIES, load_theirs, make_checkpoint, mlx_logits, torch_logits
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from tiny import make_adapter, make_model

from mlx_edgelora.export.__main__ import main
from mlx_edgelora.export.peft import export_peft
from mlx_edgelora.export.peft_names import SAME_NAMES
from mlx_edgelora.training.adapters import save_adapters

LLAMA = "mlx_lm.models.llama"
TOKENS = [3, 17, 9, 50, 77, 4, 66]
# Warnings of the three libraries about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def peft_logits(model, folder):
    peft = pytest.importorskip("peft")
    return torch_logits(peft.PeftModel.from_pretrained(load_theirs(model), folder), TOKENS)


def assert_close(found, expected):
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4, rtol=0)


def make_dora(folder, model, keys, rank=4, scale=3.0):
    loaded, _ = load_model(model)
    loaded.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(loaded, 2, parameters, use_dora=True)
    weights = {
        name: value * 1.1 if name.endswith(".m") else 0.1 * mx.random.normal(value.shape)
        for name, value in tree_flatten(loaded.trainable_parameters())
    }
    config = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": parameters}
    save_adapters(folder, weights, config | {"model": str(model)})
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_the_same_logits(tmp_path, name):
    model = make_checkpoint(tmp_path / "model", name)
    adapter = make_adapter(tmp_path / "adapter", model, rank=5, scale=3.3)
    export_peft(adapter, tmp_path / "peft", notify=str)
    found, before = peft_logits(model, tmp_path / "peft"), mlx_logits(model, TOKENS)
    assert np.abs(found - np.array(before)).max() > 0.1  # the adapter does something
    assert_close(found, mlx_logits(model, TOKENS, adapter))


@pytest.mark.parametrize(
    "keys",
    [
        ["self_attn.q_proj", "mlp.switch_mlp.down_proj"],
        ["mlp.switch_mlp.up_proj"],
        ["mlp.switch_mlp.gate_proj", "mlp.gate", "mlp.up_proj"],
    ],
    ids=str,
)
def test_some_matrices_of_experts(tmp_path, keys):
    """Layers of a block that is dense, and matrices of experts without their neighbours."""
    model = make_checkpoint(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", model, keys)
    export_peft(adapter, tmp_path / "peft", notify=str)
    assert_close(peft_logits(model, tmp_path / "peft"), mlx_logits(model, TOKENS, adapter))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tmp_path, tied, capsys):
    model = make_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=tied)
    keys = ["model.embed_tokens", "self_attn.v_proj"] + ([] if tied else ["lm_head"])
    adapter = make_adapter(tmp_path / "adapter", model, keys)
    target = tmp_path / "peft"
    command = ["peft", "--adapter-path", str(adapter), "--save-path", str(target)]
    if tied:
        assert main(command) == 2 and not target.exists()
        assert "the model's vocabulary head as well" in capsys.readouterr().err
        return
    assert main(command) == 0
    assert_close(peft_logits(model, target), mlx_logits(model, TOKENS, adapter))


def test_dora(tmp_path):
    model = make_checkpoint(tmp_path / "model", "llama")
    adapter = make_dora(tmp_path / "adapter", model, ["self_attn.q_proj", "mlp.down_proj"])
    export_peft(adapter, tmp_path / "peft", notify=str)
    assert_close(peft_logits(model, tmp_path / "peft"), mlx_logits(model, TOKENS, adapter))


@pytest.mark.parametrize("name", sorted(SAME_NAMES & (set(CONFIGS) | set(FAMILIES))))
def test_names_are_those_of_transformers(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = COMMON | BASE | CONFIGS.get(name, {})
    config = transformers.AutoConfig.for_model(name, **settings)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    architecture = importlib.import_module(f"mlx_lm.models.{name}" if name != "mistral" else LLAMA)
    arguments = config.to_dict() | settings | {"model_type": name}
    ours = architecture.Model(architecture.ModelArgs.from_dict(arguments))
    names = linear(ours, nn.Linear)
    assert names and names <= linear(theirs, torch.nn.Linear)


def linear(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_the_configuration(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model, ["self_attn.q_proj"], rank=4, scale=2.5)
    export_peft(adapter, tmp_path / "peft", base_model="meta-llama/X", notify=str)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/X"
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 10, False)
    assert config["target_modules"] == ["self_attn.q_proj"]
    assert config["layers_to_transform"] == [1, 2]
    arrays = mx.load(str(tmp_path / "peft/adapter_model.safetensors"))
    ours = mx.load(str(adapter / "adapters.safetensors"))
    assert len(arrays) == len(ours) == 4
    place = "model.layers.2.self_attn.q_proj"
    for theirs, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
        name = f"base_model.model.{place}.{theirs}.weight"
        assert mx.array_equal(arrays[name], ours[f"{place}.{leaf}"].T)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt_oss", [], "PEFT's names for the layers of gpt_oss are not known here"),
        ("llama", ["--model", "nowhere/at/all"], "is not a folder"),
        ("llama", ["--adapter-path", "nowhere"], "is not the folder of an adapter"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(tmp_path, capsys, name, options, message):
    model = make_model(tmp_path / "model", name, quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model, ["self_attn.q_proj"])
    target = tmp_path / "peft"
    command = ["peft", "--adapter-path", str(adapter), "--save-path", str(target), *options]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_missing_tensors_and_other_shapes_are_refused(tmp_path, capsys):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model)
    weights = mx.load(str(adapter / "adapters.safetensors"))
    lost = weights.pop("model.layers.1.mlp.up_proj.lora_a")
    mx.eval(weights)
    command = ["peft", "--adapter-path", str(adapter), "--save-path", str(tmp_path / "peft")]
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    assert main(command) == 2
    assert "lacks model.layers.1.mlp.up_proj.lora_a" in capsys.readouterr().err
    weights["model.layers.1.mlp.up_proj.lora_a"] = lost[:, :3]
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    assert main(command) == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
