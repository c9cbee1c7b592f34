"""Which layers of a block get adapters, by the option `lora_preset`."""

import json
from types import SimpleNamespace

import mlx.nn as nn
import pytest
from architectures import build
from mlx.utils import tree_flatten
from tiny import make_data, make_model

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.lora import add_lora, preset_keys
from mlx_edgelora.training import opening, summary
from mlx_edgelora.training.finetune import finetune

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPERTS = {f"switch_mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("llama", ATTENTION, MLP),
        ("qwen3_moe", ATTENTION, {"mlp.gate", *MLP} | {f"mlp.{name}" for name in EXPERTS}),
        (
            "gpt_oss",
            ATTENTION,
            {"mlp.router", *(f"mlp.{n.replace('switch_mlp', 'experts')}" for n in EXPERTS)},
        ),
    ],
)
def test_layers_of_a_preset(name, attention, mlp):
    model = build(name)
    assert set(preset_keys(model, "attention")) == attention
    assert set(preset_keys(model, "mlp")) == mlp
    assert preset_keys(model, "all") is None


def test_recurrent_layers_of_a_hybrid_count_as_attention():
    model = build("qwen3_next")
    attention, mlp = (set(preset_keys(model, preset)) for preset in ("attention", "mlp"))
    assert {"linear_attn.out_proj", "self_attn.q_proj"} < attention
    assert {"mlp.shared_expert.up_proj", "mlp.switch_mlp.up_proj"} < mlp


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen3_next", "gpt_oss"])
def test_the_two_presets_are_what_mlx_lm_adapts(name):
    def trained(*presets):
        model, found = build(name), []
        for preset in presets:
            found += preset_keys(model, preset) or ()
        add_lora(model, -1, keys=found or None)
        return {name for name, _ in tree_flatten(model.trainable_parameters())}

    assert trained("attention", "mlp") == trained("all")


def test_an_adapted_model_has_the_same_presets():
    plain, adapted = build("qwen3_moe"), build("qwen3_moe")
    add_lora(adapted, -1)
    for preset in ("attention", "mlp"):
        assert preset_keys(adapted, preset) == preset_keys(plain, preset)


def test_blocks_without_such_layers_are_an_error():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

        def __call__(self, x, mask=None, cache=None):
            return self.up(x)

    with pytest.raises(EdgeLoraError, match="lora_preset: got 'attention', but no layer"):
        preset_keys(SimpleNamespace(layers=[Block()]), "attention")


def test_a_preset_with_keys_is_an_error():
    with pytest.raises(EdgeLoraError, match="lora_preset: got 'mlp' with lora_parameters"):
        TrainConfig(lora_preset="mlp", lora_parameters={"keys": ["self_attn.q_proj"]})


def test_an_unknown_preset_is_an_error():
    with pytest.raises(EdgeLoraError, match="lora_preset: got 'experts', expected"):
        TrainConfig(lora_preset="experts")


def test_a_run_writes_the_keys_of_its_preset(tmp_path):
    model, data = make_model(tmp_path / "model", "qwen3_moe"), make_data(tmp_path / "data")
    options = {"model": str(model), "data": str(data), "adapter_path": str(tmp_path / "adapter")}
    config = TrainConfig(
        **options, iters=1, batch_size=1, lora_preset="attention", val_batches=0, num_layers=-1
    )
    finetune(config)
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert set(saved["lora_parameters"]["keys"]) == ATTENTION and saved["lora_preset"] is None


@pytest.mark.parametrize(("preset", "says"), [("all", True), ("attention", False)])
def test_the_header_says_what_adapters_over_experts_take(tmp_path, preset, says):
    config = TrainConfig(model=str(make_model(tmp_path, "qwen3_moe")), lora_preset=preset)
    lazy = opening.adapted_model(config)
    text = summary._adapters(config, lazy)
    # Two blocks with four experts of 64 x 32, three matrices each, rank 8, float32.
    size = 2 * 4 * 3 * 8 * (64 + 32) * 4
    assert (f"adapters over all experts: {size / 1000:.3g} kB" in text) == says, text
    assert ("with moments" in text and "--lora-preset attention" in text) == says
