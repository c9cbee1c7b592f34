"""Models and adapters that someone made to break the reader: refused before anything is built."""

import json
import os
import struct
import subprocess
import sys
import time

import pytest
from tiny import make_model

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import load_lazily, read_checkpoint
from mlx_edgelora.storage import safetensors
from mlx_edgelora.storage.safetensors import read_header


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# Each of these ended the process (SIGFPE), took minutes, or was a traceback.
CONFIGS = [
    ({"num_hidden_layers": 100_000}, "100000, expected a whole number from 1 to 65536"),
    ({"num_hidden_layers": 900}, "num_hidden_layers is 900, but the shards hold 3 blocks"),
    ({"hidden_size": 3}, "packed weights of shape"),
    ({"intermediate_size": 2}, "packed weights of shape"),
    ({"hidden_size": 0}, "hidden_size is 0, expected a whole number from 1"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": -2, "head_dim": -16}, "is -2|is -16"),
    ({"head_dim": 16.0}, "head_dim is 16.0"),
    ({"quantization": {"group_size": 0, "bits": 4}}, "has a quantization of"),
    ({"quantization": {"group_size": 32, "bits": 7}}, "has a quantization of"),
    ({"quantization": {"group_size": 32, "bits": 4, "mode": "x"}}, "has a quantization of"),
    ({"quantization": {"group_size": 32, "bits": 4, "lm_head": {"bits": 4}}}, "quantization of"),
    ({"quantization": [1]}, "has a quantization of"),
    ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads is 0"),
    ({"rope_theta": "x" * 10**6}, "mlx-lm cannot build"),
]


@pytest.mark.parametrize("changes, sentence", CONFIGS, ids=lambda value: str(value)[:40])
def test_sizes_are_checked_before_the_model_is_built(model, changes, sentence):
    began = time.perf_counter()
    with pytest.raises(EdgeLoraError, match=sentence) as caught:
        load_lazily(read_checkpoint(edited(model, **changes)))
    assert len(str(caught.value)) < 1500
    assert time.perf_counter() - began < 5


def test_the_command_ends_in_a_sentence_where_mlx_would_end_the_process(model, tmp_path):
    edited(model, hidden_size=3)
    arguments = ["-m", "mlx_edgelora.plan", "--model", str(model), "--num-layers", "1"]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, start, stop, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = [
    ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, b"x" * 6, "'b' starts at byte"),
    ({"a": entry([4], 0, 4), "b": entry([4], 8, 12)}, b"x" * 12, "'b' starts at byte"),
    ({"a": entry([4], -4, 0)}, b"", "are not counts"),
    ({"a": entry([-2, -2], 0, 4)}, b"x" * 4, "are not counts"),
    ({"a": entry([2**40, 2**40], 0, 0)}, b"", "its shape needs"),
    ({"a": entry([0, 2**40], 0, 0)}, b"", "has a shape of"),
    ({"a": entry([1] * 40, 0, 1)}, b"x", "has a shape of"),
    ({"a": entry([2.0], 0, 2)}, b"xx", "are not counts"),
    ({"a": entry([1], 0, 1, "PICKLE" * 10**5)}, b"x", "has dtype 'PICKLE"),
    ({"a" * 10**6: entry([2], 0, 1)}, b"x", "spans 1 bytes"),
    ({"__metadata__": {"a": 1}}, b"", "metadata"),
    ({"__metadata__": [1]}, b"", "metadata"),
    (b'{"a": ' + b"[" * 100_000, b"", "is not JSON"),
    (b'{"a": 1, "a": 2}', b"", "occurs twice"),
]


@pytest.mark.parametrize("header, data, sentence", HEADERS, ids=range(len(HEADERS)))
def test_headers_are_refused(tmp_path, header, data, sentence):
    path = write(tmp_path / "m.safetensors", header, data)
    with pytest.raises(EdgeLoraError, match=sentence) as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


def test_large_headers_are_refused_unread(tmp_path, monkeypatch):
    path = write(tmp_path / "m.safetensors", {}, length=50_000_000)
    os.truncate(path, 60_000_000)  # no disk space is used
    began = time.perf_counter()
    with pytest.raises(EdgeLoraError, match="header has 50000000 bytes, expected at most"):
        read_header(path)
    assert time.perf_counter() - began < 1
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 2)
    write(path, {name: entry([0], 0, 0) for name in "abc"})
    with pytest.raises(EdgeLoraError, match="it has 3 tensors, expected at most 2"):
        read_header(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, model):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(EdgeLoraError, match="is a pipe"):
        read_header(tmp_path / "m.safetensors")
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(EdgeLoraError, match="is no file of at most"):
        read_checkpoint(model)
