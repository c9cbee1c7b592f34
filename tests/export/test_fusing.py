"""Fused models against `mlx_lm.fuse`, to the last bit, in the memory of a few tensors."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import config
from mlx.utils import tree_flatten
from mlx_lm import fuse as mlx_lm_fuse
from mlx_lm.models import pixtral
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_model, save_config
from tiny import make_adapter, make_model

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.export import fusing, merged_rows
from mlx_edgelora.export.fusing import fuse
from mlx_edgelora.fuse import main

MODELS = {
    "llama": {},
    "qwen3": {"quantized": True},
    "gemma2": {"quantized": True, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
    "deepseek_v3": {},
    "qwen3_moe": {"quantized": True},
}


def run_mlx_lm(monkeypatch, model, adapter, target, *flags):
    command = ["fuse", "--model", model, "--adapter-path", adapter, "--save-path", target, *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    mlx_lm_fuse.main()


def tensors(folder):
    found = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(shard))
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name], array), name


@pytest.mark.parametrize("flags", [(), ("--dequantize",)], ids=str)
@pytest.mark.parametrize(
    ("name", "dora"), [*((name, False) for name in MODELS), ("qwen2", True), ("qwen3", True)]
)
def test_as_mlx_lm_to_the_last_bit(tmp_path, monkeypatch, capsys, name, dora, flags):
    settings = dict(MODELS.get(name, {}))
    keys = settings.pop("keys", None)
    model = make_model(tmp_path / "model", name, **({"quantized": False} | settings))
    adapter = make_adapter(tmp_path / "adapter", model, keys, dora=dora)
    run_mlx_lm(monkeypatch, model, adapter, tmp_path / "theirs", *flags)
    command = ["--adapter-path", str(adapter), "--save-path", str(tmp_path / "ours"), *flags]
    assert main(command) == 0
    assert "mlx-edgelora generate --model" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    read = json.loads
    for file in ("config.json", "model.safetensors.index.json"):
        ours, theirs = (tmp_path / who / file for who in ("ours", "theirs"))
        assert read(ours.read_text()) == read(theirs.read_text())
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(path.startswith(".") for path in names)


@pytest.mark.parametrize("flags", [(), ("--dequantize",)], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_large_layers_are_merged_some_rows_at_a_time(tmp_path, monkeypatch, capsys, name, flags):
    """As mlx-lm to the last bit, in tiles that the rows do not divide into."""
    monkeypatch.setattr(merged_rows, "TILE", 64 * 7)
    model = make_model(tmp_path / "model", name, quantized=True)
    adapter = make_adapter(tmp_path / "adapter", model)
    run_mlx_lm(monkeypatch, model, adapter, tmp_path / "theirs", *flags)
    layers = []
    merge = fusing.merged_rows
    monkeypatch.setattr(fusing, "merged_rows", lambda *args: layers.append(args) or merge(*args))
    command = ["--adapter-path", str(adapter), "--save-path", str(tmp_path / "ours"), *flags]
    assert main(command) == 0
    assert len(layers) >= 14
    assert_same(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))


def test_a_large_layer_needs_little_memory(monkeypatch):
    monkeypatch.setattr(merged_rows, "TILE", 1 << 16)
    base = nn.QuantizedLinear.from_linear(nn.Linear(512, 1024, bias=False), 64, 4)
    layer = LoRALinear.from_base(base, r=4, scale=3.0)
    layer.lora_b = mx.random.normal((4, 1024))
    mx.eval(layer.parameters())
    peaks, results = [], []
    for compute in (layer.fuse, lambda: merged_rows.merged_rows(layer, False)):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        merged = compute()
        found = {name: merged[name] for name in merged_rows.MERGED_ROWS}
        del merged
        mx.eval(found)
        peaks.append(mx.get_peak_memory() - before)
        results.append(found)
    product, packed = 4 * 512 * 1024, sum(array.nbytes for array in results[0].values())
    tile = 4 * merged_rows.TILE
    assert peaks[1] < product + 2 * packed + 3 * tile < peaks[0], peaks
    assert_same(results[1], results[0])


def test_several_adapters_are_added_up(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    one = make_adapter(tmp_path / "one", model, ["self_attn.q_proj"], rank=4)
    two = make_adapter(tmp_path / "two", model, rank=3, scale=5.0, num_layers=1, seed=1)
    fuse(None, [one, two], tmp_path / "sum", weights=[0.5, 2.0], notify=str)
    found, expected = tensors(tmp_path / "sum"), tensors(model)
    for folder, scale in ((one, 0.5 * 3.0), (two, 2.0 * 5.0)):
        arrays = mx.load(str(folder / "adapters.safetensors"))
        for name in [name for name in arrays if name.endswith("lora_a")]:
            weight = name.replace("lora_a", "weight")
            b = arrays[name.replace("lora_a", "lora_b")]
            expected[weight] = expected[weight] + scale * (arrays[name] @ b).T
    changed = 0
    for name, array in expected.items():
        assert mx.allclose(found[name], array, atol=1e-5), name
        changed += name.endswith("weight")
    assert changed


def test_layers_without_an_adapter_keep_their_bits(tmp_path):
    """They must not be unpacked and packed again."""
    model = make_model(tmp_path / "model", "qwen3")
    one = make_adapter(tmp_path / "one", model, ["self_attn.q_proj"])
    fuse(None, [one, one], tmp_path / "sum", weights=[0.5, 0.5], notify=str)
    before, after = tensors(model), tensors(tmp_path / "sum")
    for name, array in before.items():
        assert mx.array_equal(array, after[name]) == ("q_proj" not in name or "layers.0" in name)


def test_weights_for_images_stay(tmp_path, monkeypatch, capsys):
    """mlx-lm runs such a model for text, and leaves them out."""
    arguments = pixtral.ModelArgs("pixtral", text_config=config("llama"))
    text = pixtral.Model(arguments)
    names = "vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.bias"
    images = {name: mx.random.normal((2, 3)).astype(mx.bfloat16) for name in names}
    model = make_model(tmp_path / "model", "llama", quantized=False)
    weights = dict(tree_flatten(text.parameters())) | images
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    save_config({"model_type": "pixtral", "text_config": config("llama")}, model / "config.json")
    (model / "model.safetensors.index.json").unlink()
    adapter = make_adapter(tmp_path / "adapter", model)
    run_mlx_lm(monkeypatch, model, adapter, tmp_path / "theirs")
    assert main(["--adapter-path", str(adapter), "--save-path", str(tmp_path / "ours")]) == 0
    assert_same(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs") | images)
    loaded, _ = load_model(tmp_path / "ours")
    assert dict(tree_flatten(loaded.parameters())).keys() == weights.keys() - images.keys()


def test_the_peak_is_a_few_tensors(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False, num_hidden_layers=12)
    adapter = make_adapter(tmp_path / "adapter", model, num_layers=12)
    whole = sum(array.nbytes for array in tensors(model).values())
    largest = max(array.nbytes for array in tensors(model).values())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fuse(None, [adapter], tmp_path / "fused", notify=str)
    peak = mx.get_peak_memory() - before
    adapters = sum(
        array.nbytes for array in mx.load(str(adapter / "adapters.safetensors")).values()
    )
    assert peak < 6 * largest + adapters < whole / 2


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fusing, "SHARD_BYTES", 40_000)
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model)
    fuse(None, [adapter], tmp_path / "whole", notify=str)
    lines = []

    def interrupt(line):
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(None, [adapter], tmp_path / "fused", notify=interrupt)
    assert not (tmp_path / "fused").exists()
    fuse(None, [adapter], tmp_path / "fused", notify=lines.append)
    assert len(lines) == len(set(lines)) == len(list((tmp_path / "whole").glob("model*s")))
    assert_same(tensors(tmp_path / "fused"), tensors(tmp_path / "whole"))
    # Shards of other inputs are not taken.
    with pytest.raises(KeyboardInterrupt):
        del lines[:]
        fuse(None, [adapter], tmp_path / "other", notify=interrupt)
    fuse(None, [adapter], tmp_path / "other", weights=[0.0], notify=str)
    assert_same(tensors(tmp_path / "other"), tensors(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "is not the folder of an adapt"),
        (lambda folder: flip(folder / "adapters.safetensors"), "the checksum differs"),
        (lambda folder: (folder / "adapters.safetensors").unlink(), "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(tmp_path, capsys, damage, message):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model)
    damage(adapter)
    target = tmp_path / "fused"
    assert main(["--adapter-path", str(adapter), "--save-path", str(target)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def test_another_model_and_a_folder_that_exists_are_refused(tmp_path, capsys):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    wider = make_model(tmp_path / "wider", "llama", quantized=False, hidden_size=96)
    adapter = make_adapter(tmp_path / "adapter", model)
    common = ["--adapter-path", str(adapter), "--save-path"]
    assert main([*common, str(tmp_path / "fused"), "--model", str(wider)]) == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
    assert main([*common, str(model)]) == 2
    assert "exists, expected a new folder" in capsys.readouterr().err
    assert np.isfinite(np.array(tensors(model)["model.norm.weight"])).all()


def test_planted_links_lead_nowhere(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    adapter = make_adapter(tmp_path / "adapter", model)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("keep")
    (tmp_path / ".fused.building").symlink_to(other)
    with pytest.raises(EdgeLoraError, match="is a link"):
        fuse(None, [adapter], tmp_path / "fused", notify=str)
    assert (other / "letter.txt").read_text() == "keep"
    (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    with pytest.raises(EdgeLoraError, match="exists"):
        fuse(None, [adapter], tmp_path / "there", notify=str)
