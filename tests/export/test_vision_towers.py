"""Vision-language checkpoints: the tower is never read, and a merged model still has it."""

import json
import os
import struct
from contextlib import closing
from pathlib import Path

import architectures
import mlx.core as mx
import mlx.nn as nn
import pytest
from harness import assert_same_gradients, engine, plain, plain_value_and_grad, random_batch
from mlx_lm.utils import load_model
from tiny import make_adapter, make_model

from mlx_edgelora.export.fusing import fuse
from mlx_edgelora.model.checkpoint import load_lazily, read_checkpoint
from mlx_edgelora.model.other_towers import other_towers, unchanged

SWEEP = json.loads((Path(__file__).parents[1] / "sweep" / "configs.json").read_text())
TOWERS = {
    "gemma3": ("vision_tower", "multi_modal_projector"),
    "qwen3_vl": ("visual",),
    "kimi_vl": ("vision_tower", "multi_modal_projector"),
    "qwen3_5:nested": ("model.visual",),
}


def vision_model(folder, name, monkeypatch, quantized=False):
    """A checkpoint with a tower in a shard of its own; gives the tower's tensors too."""
    own = name.partition(":")[0]
    monkeypatch.setitem(architectures.CONFIGS, own, SWEEP[name])
    make_model(folder, own, quantized)
    tower = {}
    for number, prefix in enumerate(TOWERS[name]):
        array = mx.random.normal((4, 64), key=mx.random.key(number))
        tower[f"{prefix}.norm.bias"] = array[0]
        tower[f"{prefix}.blocks.0.proj.weight"] = array
        if quantized:
            leaves = mx.quantize(array, 32, 4)
            parts = ("weight", "scales", "biases")
            tower |= {f"{prefix}.packed.{p}": a for p, a in zip(parts, leaves, strict=True)}
    mx.save_safetensors(str(folder / "model-vision.safetensors"), tower)
    return folder, tower


def tensors(folder):
    return {
        n: a for shard in folder.glob("model*.safetensors") for n, a in mx.load(str(shard)).items()
    }


@pytest.mark.parametrize(
    ("name", "quantized", "dequantize"),
    [
        ("gemma3", True, False),
        pytest.param("gemma3", True, True, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", False, False, marks=pytest.mark.slow),
        pytest.param("kimi_vl", False, False, marks=pytest.mark.slow),
        pytest.param("qwen3_5:nested", False, False, marks=pytest.mark.slow),
    ],
)
def test_a_merged_model_has_its_tower(name, quantized, dequantize, tmp_path, monkeypatch):
    model, tower = vision_model(tmp_path / "model", name, monkeypatch, quantized)
    adapter = make_adapter(tmp_path / "adapter", model)
    fuse(None, [adapter], tmp_path / "fused", dequantize=dequantize, notify=str)
    found = tensors(tmp_path / "fused")
    if dequantize:
        for prefix in TOWERS[name]:
            parts = [tower.pop(f"{prefix}.packed.{p}") for p in ("weight", "scales", "biases")]
            tower[f"{prefix}.packed.weight"] = mx.dequantize(*parts, group_size=32, bits=4)
            assert f"{prefix}.packed.scales" not in found
    for key, array in tower.items():
        assert mx.array_equal(found[key], array), key
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    again, config = load_model(tmp_path / "fused")  # mlx-lm leaves it out again
    assert ("quantization" in config) == (quantized and not dequantize)
    assert mx.isfinite(again(mx.array([[1, 2]]))).all()


@pytest.mark.slow
def test_a_run_never_reads_a_tower(tmp_path, monkeypatch):
    """A tower of 64 GiB of holes: whoever reads it would need them."""
    model, _ = vision_model(tmp_path / "model", "gemma3", monkeypatch)
    shard, size = model / "model-vision.safetensors", 2**36
    entry = {"dtype": "F32", "shape": [2**17, 2**17], "data_offsets": [0, size]}
    header = json.dumps({"vision_tower.huge.weight": entry}).encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(shard, 8 + len(header) + size)
    batch = random_batch(2, 17)
    expected_loss, expected = plain_value_and_grad(plain(model), batch)
    for options in ({"streamed": False}, {"tile_tokens": 10}):
        with closing(engine(model, **options)) as ours:
            (loss, _), got = ours.value_and_grad(batch)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(got, expected)


def test_what_a_language_model_is_computed_from_is_no_tower(tmp_path, monkeypatch):
    """DeepSeek's matrices are split, and stacked experts made of single ones."""
    folder = make_model(tmp_path, "deepseek_v3", quantized=False)
    lazy = load_lazily(read_checkpoint(folder))
    assert lazy.find_other_towers() == []

    class Renaming(nn.Module):
        def sanitize(self, weights):
            return {"sum": weights["a.x"] + weights["a.y"], "b.z": weights["b.z"]}

    arrays = {name: mx.ones(2) for name in ("a.x", "a.y", "b.z", "c.d.e")}
    sanitize = Renaming().sanitize
    made = sanitize(arrays)
    assert other_towers(arrays, unchanged(arrays, made), set(made), sanitize) == ["c.d.e"]
