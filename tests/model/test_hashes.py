"""`mlx-edgelora verify --weights`: a changed bit in a shard is seen where a hash was recorded."""

import hashlib
import os

import pytest
from tiny import make_model

from mlx_edgelora.verify import main


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path, at=-100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def sums(shard):
    (shard.parent / "SHA256SUMS").write_text(f"{digest(shard)} *{shard.name}\n")


def download(shard):
    folder = shard.parent / ".cache/huggingface/download"
    folder.mkdir(parents=True)
    (folder / f"{shard.name}.metadata").write_text(f"main\n{digest(shard)}\n1.5\n")


def hub(shard):
    blob = shard.parent.parent / "blobs" / digest(shard)
    blob.parent.mkdir()
    os.rename(shard, blob)
    shard.symlink_to(blob)


@pytest.mark.parametrize("record", [sums, download, hub], ids=lambda f: f.__name__)
def test_one_changed_bit_is_seen(model, record, capsys):
    shard = model / "model.safetensors"
    record(shard)
    assert main(["--weights", "--model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{digest(shard)}  model.safetensors\n")
    assert "Every shard is the file that was recorded." in printed
    flip(shard.resolve())
    assert main(["--model", str(model), "--weights"]) == 1
    assert "damaged: model.safetensors is not the file that" in capsys.readouterr().out


def test_a_model_without_hashes_says_so(model, capsys):
    assert main(["--model", str(model), "--weights"]) == 0
    assert "No hash was recorded" in capsys.readouterr().out


def test_header_and_size_are_checked_always(model, capsys):
    flip(model / "model.safetensors", 20)
    assert main(["--model", str(model), "--weights"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_value_is_that_of_train(model, capsys):
    assert main(["--model", str(model), "--weights", "nowhere"]) == 2
    assert "--weights: got 'nowhere', expected one of streamed" in capsys.readouterr().err
