"""An adapter knows the weights that it was trained on, and no others are used unasked."""

import importlib
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import make_adapter, make_data, make_model, run_options, write_rows

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.inference.loading import load
from mlx_edgelora.model.hashes import SAMPLES, weights_fingerprint
from mlx_edgelora.storage.safetensors import read_metadata
from mlx_edgelora.training.adapters import model_for, save_adapters

WEIGHTS = "adapters.safetensors"


def change_one_tensor(model):
    file = model / "model.safetensors"
    arrays = mx.load(str(file))
    name = next(name for name in arrays if name.endswith("layers.1.mlp.up_proj.weight"))
    arrays[name] = arrays[name] + 1
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = make_model(folder / "model", "llama", quantized=False)
    make_adapter(folder / "adapter", model)
    other = shutil.copytree(model, folder / "other")
    change_one_tensor(other)
    write_rows(folder / "test.jsonl", [{"prompt": "w1", "completion": "w2"}])
    return folder


def test_other_weights_have_another_fingerprint(made, tmp_path):
    expected = weights_fingerprint(made / "model")
    assert weights_fingerprint(made / "other") != expected
    # Shards and their order, the place and the configuration do not matter.
    arrays = mx.load(str(made / "model/model.safetensors"))
    shutil.copy(made / "model/config.json", tmp_path)
    with open(tmp_path / "config.json", "a") as file:
        file.write("\n")
    names = sorted(arrays, reverse=True)
    for number, part in enumerate((names[:7], names[7:])):
        file = tmp_path / f"model-{number}.safetensors"
        mx.save_safetensors(str(file), {name: arrays[name] for name in part})
    assert weights_fingerprint(tmp_path) == expected


def test_samples_are_few(made, monkeypatch):
    monkeypatch.setattr("mlx_edgelora.model.hashes.SAMPLES", 3)
    monkeypatch.setattr("mlx_edgelora.model.hashes.SAMPLE_BYTES", 5)
    reads = []
    real = importlib.import_module("os").pread
    monkeypatch.setattr("os.pread", lambda *args: reads.append(args) or real(*args))
    weights_fingerprint(made / "model")
    assert SAMPLES == 256 and 1 < len(reads) <= 3 and {size for _, size, _ in reads} == {5}


def test_a_run_writes_it_with_every_file_of_weights(tmp_path):
    make_model(tmp_path / "model", "llama")
    make_data(tmp_path / "data")
    options = run_options(tmp_path, tmp_path) | {"iters": 1, "save_every": 1, "save_best": True}
    finetune(TrainConfig.from_dict(options | {"val_batches": 1}), notify=str)
    files = list((tmp_path / "adapters").rglob(f"*{WEIGHTS}"))
    assert len(files) == 4  # at the top, numbered, of the checkpoint and the best
    found = {read_metadata(file)["base_model"] for file in files}
    assert found == {weights_fingerprint(tmp_path / "model")}
    lines = []
    change_one_tensor(tmp_path / "model")
    start = {"resume_adapter_file": str(tmp_path / "adapters"), "save_best": False}
    start["adapter_path"] = str(tmp_path / "b")
    finetune(TrainConfig.from_dict(options | start), notify=lines.append)
    assert any("was trained on other weights" in line for line in lines), lines


@pytest.fixture
def replaced(made, tmp_path):
    """An adapter whose model was replaced by another one of the same shape."""
    shutil.copytree(made / "model", tmp_path / "model")
    make_adapter(tmp_path / "adapter", tmp_path / "model")
    change_one_tensor(tmp_path / "model")
    return tmp_path


COMMANDS = {
    "generate": ["--prompt", "w1", "-m", "1"],
    "evaluate": ["--num-samples", "0", "--data", "{made}/test.jsonl"],
    "fuse": ["--save-path", "{folder}/written"],
    "export.__main__": ["peft", "--save-path", "{folder}/written"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_replaced_weights_are_refused_unless_they_are_asked_for(made, replaced, capsys, command):
    run = importlib.import_module(f"mlx_edgelora.{command}").main
    flags = [flag.format(made=made, folder=replaced) for flag in COMMANDS[command]]
    flags += ["--adapter-path", str(replaced / "adapter")]
    assert run(flags) == 2
    error = capsys.readouterr().err
    assert "was trained on other weights than those that are in" in error and "--model" in error
    assert not (replaced / "written").exists()
    assert run([*flags, "--model", str(replaced / "model")]) == 0
    said = capsys.readouterr()
    assert "results may be worse" in " ".join((said.out + said.err).split())


def test_the_same_weights_at_another_place_are_the_model(made, tmp_path):
    copy = shutil.copytree(made / "model", tmp_path / "copy")
    notes = []
    assert model_for(made / "adapter", str(copy), notes.append) == str(copy)
    assert model_for(made / "adapter", None, notes.append) == str(made / "model")
    assert notes == []
    assert model_for(made / "adapter", str(made / "other"), notes.append) and len(notes) == 1


def test_adapters_that_know_no_model_are_taken(made, tmp_path):
    arrays = mx.load(str(made / "adapter" / WEIGHTS))
    config = {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0}}
    save_adapters(tmp_path / "a", arrays, config | {"model": str(made / "other")})
    assert model_for(tmp_path / "a", None, pytest.fail) == str(made / "other")
    with pytest.raises(EdgeLoraError, match=r"nowhere.* is not a folder"):
        model_for(made / "adapter", "nowhere", pytest.fail)


def test_python_warns(made):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load(str(made / "other"), made / "adapter", tokens=8)
    (warning,) = found
    assert "was trained on other weights" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)
