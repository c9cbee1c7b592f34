"""Caches: what the doctor finds and removes, and what happens to damaged ones."""

import os

import pytest
from tiny import make_model

from mlx_edgelora import doctor
from mlx_edgelora.checkup.caches import entries
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.planner.machine import _read
from mlx_edgelora.storage.temporaries import mark_used, temporary_folder, temporary_name


@pytest.fixture
def filled(tmp_path):
    """A cache with one entry of each kind, a left-over, and files of somebody else."""
    folder = tmp_path / "cache"
    names = ["machine.json", "measured.json", "neighbours-0123456789abcdef-k8.bin"]
    names += ["model-0123456789abcdef/config.json", "random-models/small-2/config.json"]
    names += ["notes.txt", "photos-0123456789abcdef/one.jpg", "adapters/adapters.safetensors"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 5000)
    temporary_name(folder / "machine.json").write_text("half")
    return folder


def run(folder, tmp_path, *more):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return doctor.main(["--clean", "--cache-dir", str(folder), "--spill-dir", str(scratch), *more])


def test_only_what_can_be_made_again_is_removed(filled, tmp_path, capsys):
    found = entries(filled, [])
    assert len(found) == 6 and all(entry.bytes >= 4096 for entry in found[1:3])
    assert run(filled, tmp_path) == 0
    assert sorted(path.name for path in filled.iterdir()) == [
        "adapters",
        "notes.txt",
        "photos-0123456789abcdef",
        "random-models",
    ]
    out = capsys.readouterr().out
    assert out.count("removed:") == 6 and "left-over of a dead run" in " ".join(out.split())
    assert run(filled, tmp_path) == 0
    assert f"nothing to remove in {filled}" in capsys.readouterr().out.replace("\n  ", " ")


def test_what_a_process_uses_is_kept(filled, tmp_path, capsys):
    model = filled / "model-0123456789abcdef"
    used = mark_used(model)
    with temporary_folder(filled / "another") as building:
        assert run(filled, tmp_path) == 0
        assert building.exists()
    assert model.exists() and "kept, a process uses it" in capsys.readouterr().out
    os.close(used)
    run(filled, tmp_path)
    assert not model.exists()


def test_cleaning_measures_nothing(filled, tmp_path, capsys):
    assert run(filled, tmp_path, "--report") == 2
    assert "--clean measures nothing; leave out --report" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "config", "missing"])
def test_a_damaged_converted_model_is_made_again(tmp_path, capsys, damage):
    make_model(tmp_path / "model", quantized=False)
    cache = tmp_path / "cache"

    def convert():
        return open_model(str(tmp_path / "model"), streamed=False, quantize=4, cache=cache)

    first = convert()
    (folder,) = cache.iterdir()
    whole = (folder / "model.safetensors").read_bytes()
    del first
    if damage == "cut":
        os.truncate(folder / "model.safetensors", len(whole) // 2)
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        (folder / "model.safetensors").unlink()
    convert()
    assert "is made again" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == whole
    convert()
    assert capsys.readouterr().out == ""


def test_a_converted_model_is_in_use_while_it_is_open(tmp_path):
    make_model(tmp_path / "model", quantized=False)
    cache = tmp_path / "cache"
    lazy = open_model(str(tmp_path / "model"), streamed=False, quantize=4, cache=cache)
    assert [entry.used for entry in entries(cache, [])] == [True]
    del lazy


@pytest.mark.parametrize(
    "rates",
    ['{"flops": "x"}', '{"flops": 0.0}', '{"flops": -1.0}', '{"flops": NaN}', '{"flops": 1e400}'],
)
def test_rates_that_are_none_are_named(tmp_path, capsys, rates):
    names = ("fused_flops", "dequantized", "moved", "read", "written", "call")
    others = ", ".join(f'"{name}": 1.0' for name in names)
    text = f'{{"key": {{"measured": 1.0, "rates": {rates[:-1]}, {others}}}}}}}'
    (tmp_path / "machine.json").write_text(text)
    assert _read(tmp_path / "machine.json") == {}
    out = capsys.readouterr().out
    assert "cannot be used (a rate is no positive number)" in out.replace("\n  ", " ")


def test_the_cache_folder_is_no_file(tmp_path):
    (tmp_path / "file").write_text("")
    make_model(tmp_path / "model", quantized=False)
    with pytest.raises(EdgeLoraError, match="the converted model cannot be written"):
        open_model(str(tmp_path / "model"), streamed=False, quantize=4, cache=tmp_path / "file")
