import errno
import json
import os
import struct

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import load_adapters
from training_helpers import load_adapter_weights, make_model

from mlx_edgelora.config import LoraParameters, TrainConfig
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage import files
from mlx_edgelora.training.adapters import save_adapters

CONFIG = TrainConfig(num_layers=-1, lora_parameters=LoraParameters(4, scale=8.0)).to_dict()
WEIGHTS = {"b.lora_a": mx.arange(6.0).reshape(2, 3), "a.lora_b": mx.ones((3, 4))}
SHAPES = {name: array.shape for name, array in WEIGHTS.items()}


@pytest.fixture
def folder(tmp_path):
    save_adapters(tmp_path, WEIGHTS, CONFIG)
    return tmp_path


@pytest.fixture
def file(folder):
    return folder / "adapters.safetensors"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip_keeps_names_order_and_bits(file):
    weights = load_adapter_weights(file, SHAPES)
    assert list(weights) == list(SHAPES)
    for name, array in WEIGHTS.items():
        assert mx.array_equal(weights[name], array)


def test_files_of_a_numbered_save(folder):
    save_adapters(folder, WEIGHTS, CONFIG, step=70)
    assert sorted(contents(folder)) == [
        "0000070_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
    ]
    numbered, latest = folder / "0000070_adapters.safetensors", folder / "adapters.safetensors"
    assert numbered.read_bytes() == latest.read_bytes()
    # Written in place by another program, the one must not change the other.
    assert numbered.stat().st_ino != latest.stat().st_ino
    assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG


def test_mlx_lm_loads_what_was_saved(tmp_path):
    model = make_model()
    generator = mx.random.key(1)
    weights = {
        name: mx.random.normal(array.shape, key=generator)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(weights.items()), strict=False)
    save_adapters(tmp_path, weights, CONFIG)
    other = llama.Model(model.args)
    base = [(n.replace(".linear.", "."), a) for n, a in tree_flatten(model.parameters())]
    other.load_weights([(n, a) for n, a in base if "lora_" not in n])
    load_adapters(other, str(tmp_path))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(other(tokens), model(tokens))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_not_saved(folder, value):
    before = contents(folder)
    weights = {**WEIGHTS, "a.lora_b": mx.array([[1.0, value]])}
    with pytest.raises(EdgeLoraError, match=r"not saved: a\.lora_b holds NaN or infinity"):
        save_adapters(folder, weights, CONFIG, step=3)
    assert contents(folder) == before


def test_large_finite_weights_are_saved(tmp_path):
    weights = {"a": mx.full((4,), 3e38)}  # their sum overflows
    save_adapters(tmp_path, weights, CONFIG)
    assert mx.array_equal(
        load_adapter_weights(tmp_path / "adapters.safetensors", {"a": (4,)})["a"], weights["a"]
    )


@pytest.mark.usefixtures("plain_fsync")
@pytest.mark.parametrize("calls_before_failure", range(3))
def test_a_full_disk_leaves_weights_and_config_as_they_were(
    folder, monkeypatch, calls_before_failure
):
    before, done, real = contents(folder), [], os.fsync

    def fsync(descriptor):
        if len(done) == calls_before_failure:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(EdgeLoraError, match=r"No space left on device.*free some space"):
        save_adapters(folder, {"other": mx.zeros((9,))}, {"num_layers": 1}, step=9)
    assert contents(folder) == before


def test_every_truncation_is_refused(file):
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(EdgeLoraError, match="damaged"):
            load_adapter_weights(file, SHAPES)


def test_trailing_bytes_are_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(EdgeLoraError, match=r"damaged safetensors file: \d+ bytes long, expected"):
        load_adapter_weights(file, SHAPES)


def test_header_bit_flips_are_refused_or_harmless(file):
    whole = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    refused = 0
    for bit in range(8 * (8 + length)):
        whole[bit // 8] ^= 1 << bit % 8
        file.write_bytes(whole)
        whole[bit // 8] ^= 1 << bit % 8
        try:
            weights = load_adapter_weights(file, SHAPES)
        except EdgeLoraError:
            refused += 1
            continue
        # What loads must be the right arrays: only metadata and spaces may differ.
        assert all(mx.array_equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    assert refused > 8 * length * 0.6


def test_wrong_names_are_all_told(file):
    expected = {"b.lora_a": (2, 3)} | {f"c{i}.lora_a": (1, 1) for i in range(5)}
    with pytest.raises(
        EdgeLoraError,
        match=r"lacks c0\.lora_a, c1\.lora_a, c2\.lora_a and 2 more and has a\.lora_b, not in this",
    ):
        load_adapter_weights(file, expected)


def test_wrong_shape_is_told_with_both_shapes(file):
    with pytest.raises(
        EdgeLoraError, match=r"b\.lora_a has shape \(2, 3\), expected \(2, 8\); .*rank"
    ):
        load_adapter_weights(file, {**SHAPES, "b.lora_a": (2, 8)})


def test_integer_weights_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((2,), mx.int32)})
    with pytest.raises(EdgeLoraError, match="a has dtype I32, expected one of F32, F16, BF16"):
        load_adapter_weights(path, {"a": (2,)})


def test_non_finite_weights_are_not_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.array([1.0, float("nan")])})
    with pytest.raises(EdgeLoraError, match=r"a holds NaN or infinity.*an earlier checkpoint"):
        load_adapter_weights(path, {"a": (2,)})


def test_half_precision_adapters_become_float32(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.array([1.5], mx.bfloat16)})
    weights = load_adapter_weights(path, {"a": (1,)})
    assert weights["a"].dtype == mx.float32
    assert weights["a"].item() == 1.5


def test_a_missing_file(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"none\.safetensors: cannot be read \(No such file"):
        load_adapter_weights(tmp_path / "none.safetensors", SHAPES)
