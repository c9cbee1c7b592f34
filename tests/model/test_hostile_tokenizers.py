"""Damaged tokenizers are refused in a sentence."""

import json

import pytest
from tiny import make_model

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model import tokenizer as module
from mlx_edgelora.model.checkpoint import load_lazily, read_checkpoint
from mlx_edgelora.model.tokenizer import load_tokenizer_of


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def load(folder):
    return load_tokenizer_of(load_lazily(read_checkpoint(folder)))


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1]",
    "not text": lambda text: "\x00\x01",
    "deep": lambda text: "[" * 100_000,
    "no model": lambda text: json.dumps(json.loads(text) | {"model": None}),
    "another vocabulary": lambda text: json.dumps(json.loads(text) | {"model": {"type": "BPE"}}),
    "ids out of range": lambda text: text.replace('"[UNK]": 1', '"[UNK]": -1'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tokenizer_is_refused(model, name):
    path = model / "tokenizer.json"
    path.write_text(DAMAGE[name](path.read_text()))
    with pytest.raises(EdgeLoraError, match=r"the tokenizer cannot be loaded|is no file"):
        load(model)


def test_a_panic_is_refused(model, monkeypatch):
    """The package tokenizers, which is written in Rust, panics for some files."""
    panic = type("PanicException", (BaseException,), {})

    def fail(*arguments, **options):
        raise panic("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(module, "load_tokenizer", fail)
    with pytest.raises(EdgeLoraError, match="the tokenizer cannot be loaded"):
        load(model)


@pytest.mark.parametrize("ids", ["2", [2, "x"], 2.5, {"a": 1}, True, -1, 2**40, [[2]]])
def test_the_end_of_a_text_is_a_token(model, ids):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    with pytest.raises(EdgeLoraError, match="eos_token_id is"):
        load(model)


def test_a_large_file_is_not_read(model):
    with open(model / "tokenizer.json", "r+b") as file:
        file.truncate(module.MOST_BYTES + 1)
    with pytest.raises(EdgeLoraError, match="is no file of at most 200 MB"):
        load(model)
