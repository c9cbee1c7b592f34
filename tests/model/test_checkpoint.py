"""Model folders: each defect has its sentence; a rewritten copy is cheap, whole and reused."""

import errno
import json
import os
import shutil

import mlx.core as mx
import pytest
from architectures import build, config
from harness import save
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model import checkpoint
from mlx_edgelora.model.checkpoint import (
    convert_checkpoint,
    load_lazily,
    read_checkpoint,
    resolve_model,
)
from mlx_edgelora.storage import files

MIB = 2**20


@pytest.fixture
def folder(tmp_path):
    """A tiny model in one shard, without an index."""
    made = save(tmp_path / "model", "llama", False)
    (made / "model.safetensors.index.json").unlink()
    return made


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def replace_tensors(folder, change):
    """Rewrite the shard with `change` applied to the dictionary of tensors."""
    path = str(folder / "model.safetensors")
    tensors = mx.load(path)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(path, tensors)


def test_resolve_takes_a_folder_as_it_is(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/model", "model", "a/b/c"])
def test_resolve_knows_what_is_no_hub_name(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **k: pytest.fail("network"))
    with pytest.raises(EdgeLoraError, match=rf"model: '{name}' is not a folder, expected"):
        resolve_model(name)


def test_resolve_fetches_from_the_hub_and_never_code(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert resolve_model("owner/model") == tmp_path
    ((name, patterns),) = asked
    assert name == "owner/model"
    assert "model*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in patterns)


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline mode is on"), OSError("no route to the host")]
)
def test_resolve_says_why_the_hub_did_not_answer(error, monkeypatch):
    def download(name, allow_patterns):
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    with pytest.raises(EdgeLoraError, match=rf"'owner/model' is not a folder here .*\({error}\)"):
        resolve_model("owner/model")


def test_checkpoint_knows_every_tensor(folder):
    found = read_checkpoint(folder)
    assert found.config["model_type"] == "llama"
    expected = dict(tree_flatten(build("llama").parameters()))
    assert found.tensors.keys() == expected.keys()
    for name, (shard, info) in found.tensors.items():
        assert shard == folder / "model.safetensors"
        assert info.shape == expected[name].shape


DEFECTS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: cannot be read as JSON"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config.json: cannot be read as JSON \(Expecting",
    ),
    "config nested too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json: cannot be read as JSON",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: not a JSON object",
    ),
    "no model_type": (
        lambda f: edit(f / "config.json", model_type=None),
        "config.json: no model_type, expected an architecture",
    ),
    "model_type is a number": (
        lambda f: edit(f / "config.json", model_type=3),
        "config.json: no model_type",
    ),
    "own code": (
        lambda f: edit(f / "config.json", model_file="run.py"),
        r"config.json: asks to run its own code \('run.py'\)",
    ),
    "no shard": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model: model\*.safetensors is missing",
    ),
    "truncated shard": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "model.safetensors: damaged safetensors file",
    ),
    "tensor twice": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"),
        r"model.safetensors: tensor '.*' is also in model-2.safetensors",
    ),
    "index names another shard": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00002.safetensors", "b": "model.safetensors"}}'
        ),
        "model: model-00002.safetensors is missing",
    ),
    "index names another tensor": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"model.extra.weight": "model.safetensors"}}'
        ),
        "the index names tensor 'model.extra.weight', which no shard has",
    ),
    "index is no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("x"),
        "index.json: cannot be read as JSON",
    ),
    "index maps to numbers": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        "index.json: weight_map does not name a file",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_a_folder_are_named(folder, name):
    damage, match = DEFECTS[name]
    damage(folder)
    with pytest.raises(EdgeLoraError, match=match):
        read_checkpoint(folder)


MISFITS = {
    "unknown architecture": (
        lambda f: edit(f / "config.json", model_type="no_such_model"),
        "no_such_model",
    ),
    "setting missing": (lambda f: edit(f / "config.json", hidden_size=None), "hidden_size"),
    "setting of another type": (lambda f: edit(f / "config.json", rms_norm_eps="x"), "Error"),
    "tensor missing": (
        lambda f: replace_tensors(f, lambda t: t.pop("model.norm.weight")),
        "Missing 1 parameters.*model.norm.weight",
    ),
    "tensor too many": (
        lambda f: replace_tensors(f, lambda t: t.update({"model.extra": mx.ones((2,))})),
        "model.extra",
    ),
    "wrong shape": (
        lambda f: replace_tensors(f, lambda t: t.update({"model.norm.weight": mx.ones((63,))})),
        r"\(63,\)",
    ),
    "wrong dtype": (
        lambda f: replace_tensors(
            f, lambda t: t.update({"lm_head.weight": mx.ones((101, 64), mx.int32)})
        ),
        "lm_head.weight has dtype mlx.core.int32, which a Linear cannot have",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_named(folder, name):
    damage, match = MISFITS[name]
    damage(folder)
    with pytest.raises(EdgeLoraError, match=rf"{folder}: .*{match}"):
        load_lazily(read_checkpoint(folder))


def test_lazy_model_knows_where_its_parameters_lie(folder, memory):
    before = mx.get_active_memory()
    lazy = load_lazily(read_checkpoint(folder))
    assert mx.get_active_memory() - before < 64 * 1024  # nothing was read
    for name, array in tree_flatten(lazy.model.parameters()):
        place = lazy.location(array)
        assert (place.shard, place.name) == (folder / "model.safetensors", name)
    assert lazy.location(mx.ones((1,))) is None


BIG = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 512}


def test_quantizing_costs_a_few_tensors_and_equals_mlx_lm(tmp_path, memory):
    folder = save(tmp_path / "model", "llama", False, **BIG)
    lazy = load_lazily(read_checkpoint(folder))
    whole = sum(array.nbytes for _, array in tree_flatten(lazy.model.parameters()))
    largest = max(array.nbytes for _, array in tree_flatten(lazy.model.parameters()))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    copy = convert_checkpoint(lazy, tmp_path / "cache", quantize=4)
    peak = mx.get_peak_memory() - before
    assert whole > 25 * MIB
    assert peak < 3 * largest < whole / 10
    ours, settings = load_model(copy)
    expected, expected_settings = quantize_model(*load_model(folder), 64, 4)
    assert settings["quantization"] == expected_settings["quantization"]
    theirs = dict(tree_flatten(expected.parameters()))
    for name, array in tree_flatten(ours.parameters()):
        assert array.dtype == theirs[name].dtype
        assert mx.array_equal(array, theirs.pop(name)).item(), name
    assert theirs == {}


def test_copy_without_quantizing_is_the_model(tmp_path, folder):
    copy = convert_checkpoint(load_lazily(read_checkpoint(folder)), tmp_path / "cache")
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(load_model(copy)[0](tokens), load_model(folder)[0](tokens)).item()
    assert json.loads((copy / "config.json").read_text()).items() >= config("llama").items()


def convert(folder, tmp_path, quantize=4):
    return convert_checkpoint(load_lazily(read_checkpoint(folder)), tmp_path / "cache", quantize)


def test_copy_is_made_once_for_what_it_depends_on(tmp_path, folder, monkeypatch):
    first = convert(folder, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", lambda *_: pytest.fail("written again"))
        assert convert(folder, tmp_path) == first
    copies = {first, convert(folder, tmp_path, quantize=8), convert(folder, tmp_path, None)}
    replace_tensors(folder, lambda t: t.update({"model.norm.weight": mx.full((64,), 2.0)}))
    copies.add(changed := convert(folder, tmp_path))
    assert mx.all(load_model(changed)[0].model.norm.weight == 2).item()
    edit(folder / "config.json", rope_theta=500.0)
    copies.add(convert(folder, tmp_path))
    assert len(copies) == 5
    assert set((tmp_path / "cache").iterdir()) == copies


@pytest.mark.usefixtures("plain_fsync")
@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_failed_copy_leaves_nothing_behind(tmp_path, folder, monkeypatch, moment):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(file, specs, arrays):
        file.write(b"half a file")
        full()

    with monkeypatch.context() as patched:
        if moment == "write":
            patched.setattr(checkpoint, "write_tensors", half)
        else:
            patched.setattr(os, moment, full)
        with pytest.raises(EdgeLoraError, match=r"cannot be written \(No space left .*--cache-dir"):
            convert(folder, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    assert load_model(convert(folder, tmp_path))[0] is not None


def test_a_copy_reaches_the_medium(tmp_path, folder, monkeypatch):
    """Its shard and configuration as on macOS, then its folder, then the name of that folder."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda fd, code: synced.append((inode(fd), code)))
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append((inode(fd), None)) or fsync(fd))
    copy = convert(folder, tmp_path)
    expected = [(copy / "model.safetensors", 51), (copy / "config.json", 51)]
    expected += [(copy, None), (copy.parent, None)]
    assert synced == [(path.stat().st_ino, code) for path, code in expected]


def inode(descriptor):
    return os.fstat(descriptor).st_ino


def test_cache_that_is_no_folder_is_named(tmp_path, folder):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(EdgeLoraError, match=rf"{tmp_path}/cache/.*cannot be written \(File exists"):
        convert(folder, tmp_path)
