"""A tiny model with its tokenizer, and data for it, on disk: what a whole run needs."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from harness import save
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_edgelora.model.hashes import weights_fingerprint
from mlx_edgelora.training.adapters import save_adapters

VOCABULARY = 128
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = ["[PAD]", "[UNK]", "</s>", "<user>", "<assistant>"]
LENGTH = 13
"""Tokens of a row of `make_data`: twelve words and the end."""


def make_model(folder: Path, name="qwen3", quantized=True, first_word=0, **changes) -> Path:
    """A random checkpoint; the ids of the tokenizer's words begin at `first_word`."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, name, quantized, vocab_size=VOCABULARY, **changes)
    words = WORDS + [f"w{i}" for i in range(100)]
    ids = {word: first_word + i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(ids, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]"
    )
    outer.chat_template = TEMPLATE
    outer.save_pretrained(folder)
    return folder


def make_adapter(folder, model, keys=None, rank=4, scale=3.0, num_layers=2, seed=0, dora=False):
    """An adapter with matrices that are not zero, as training leaves them."""
    loaded, _ = load_model(model, lazy=True)
    loaded.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    mx.random.seed(seed)
    linear_to_lora_layers(loaded, num_layers, parameters, use_dora=dora)
    weights = {
        name: mx.random.normal(value.shape) * 0.1 + (value if name.endswith(".m") else 0)
        for name, value in tree_flatten(loaded.trainable_parameters())
    }
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "model": str(model),
    }
    save_adapters(folder, weights, config, base=weights_fingerprint(model))
    return folder


def make_data(folder: Path, rows=8, splits=("train", "valid", "test")) -> Path:
    """Texts of random words, all of `LENGTH` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split in splits:
        texts = [words(rng.integers(0, 100, LENGTH - 1)) for _ in range(rows)]
        write_rows(folder / f"{split}.jsonl", [{"text": text} for text in texts])
    return folder


def words(numbers) -> str:
    return " ".join(f"w{number}" for number in numbers)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_options(tiny: Path, folder: Path) -> dict:
    """Options of a run of two steps on the tiny model, without validation."""
    return {
        "model": str(tiny / "model"),
        "data": str(tiny / "data"),
        "adapter_path": str(folder / "adapters"),
        "spill_dir": str(folder),
        "num_layers": -1,
        "batch_size": 2,
        "iters": 2,
        "max_seq_length": LENGTH,
        "val_batches": 0,
    }
