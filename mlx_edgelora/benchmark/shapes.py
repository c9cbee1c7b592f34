"""Random models with the shapes of real ones, written one tensor at a time, and a tokenizer."""

import json
import os
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3, gpt_oss, llama, qwen2, qwen3_moe
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_edgelora.benchmark import hybrid_shapes
from mlx_edgelora.benchmark.expert_shapes import EXPERTS, PACKED_EXPERTS
from mlx_edgelora.model.checkpoint import write_model
from mlx_edgelora.storage.files import user_cache, write_atomically
from mlx_edgelora.storage.temporaries import remove_left_overs, temporary_folder

COMMON = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500000.0}
# Architecture, blocks, hidden size, intermediate size, heads, key-value heads, vocabulary.
SHAPES = {
    "small": (llama, 4, 256, 1024, 8, 2, 1024),
    "medium": (llama, 8, 512, 2048, 8, 2, 8192),
    "smollm2-135m": (llama, 30, 576, 1536, 9, 3, 49152),
    "llama-3.2-3b": (llama, 28, 3072, 8192, 24, 8, 128256),
    "llama-3.2-1b": (llama, 16, 2048, 8192, 32, 8, 128256),
    "llama-3.1-8b": (llama, 32, 4096, 14336, 32, 8, 128256),
    "llama-3.3-70b": (llama, 80, 8192, 28672, 64, 8, 128256),
    "qwen2.5-3b": (qwen2, 36, 2048, 11008, 16, 2, 151936),
    "qwen2.5-0.5b": (qwen2, 24, 896, 4864, 14, 2, 151936),
    "qwen3-30b-a3b": (qwen3_moe, 48, 2048, 6144, 32, 4, 151936),
    "qwen3-moe-small": (qwen3_moe, 12, 1024, 3072, 16, 4, 16384),
    "gpt-oss-20b": (gpt_oss, 24, 2880, 2880, 64, 8, 201088),
    "deepseek-v3-16-experts": (deepseek_v3, 61, 7168, 18432, 128, 128, 129280),
    "deepseek-small": (deepseek_v3, 12, 1024, 2816, 16, 16, 16384),
} | hybrid_shapes.SHAPES
# Shapes of models whose head is not tied to the embedding.
UNTIED = ("llama-3.1-8b", *EXPERTS, *hybrid_shapes.UNTIED)
WEIGHTS = ("float32", "bfloat16", "4bit")
GROUP, BITS = 64, 4
# Number of words of the tokenizer of a random model.
WORDS = 1000
TEMPLATE = (
    "{% for message in messages %}{{ message.content }} "
    "{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
)


def default_cache() -> Path:
    """Default folder of random models."""
    return user_cache() / "random-models"


def config_of(shape: str, blocks: int) -> tuple[ModuleType, dict]:
    """The architecture of a shape, and its configuration with `blocks` blocks."""
    module, _, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    others = EXPERTS.get(shape, {}) | hybrid_shapes.settings_of(shape, blocks)
    return module, COMMON | others | {
        "model_type": module.__name__.rpartition(".")[2],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "num_hidden_layers": blocks,
        "tie_word_embeddings": shape not in UNTIED,
    }


def random_model(
    shape: str, blocks: int, weights: str, vocabulary: int | None = None
) -> tuple[nn.Module, dict]:
    """A model with random weights that are not evaluated yet, and its configuration."""
    module, config = config_of(shape, blocks)
    if vocabulary is not None:
        config |= {name: vocabulary for name in config if name.startswith("vocab_size")}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    if weights != "float32":
        model.set_dtype(mx.bfloat16)
    if weights == "4bit":
        config = config | {"quantization": _quantize(model, PACKED_EXPERTS.get(shape))}
    return model, config


def _quantize(model: nn.Module, experts: dict | None) -> dict:
    """Pack a model, its experts perhaps in another way; returns how, as mlx-lm reads it."""
    settings: dict = {"group_size": GROUP, "bits": BITS}

    def packing(path: str, module: nn.Module) -> bool | dict:
        if not hasattr(module, "to_quantized"):
            return False
        if experts is None or not isinstance(module, SwitchLinear):
            return True
        settings[path] = experts
        return experts

    nn.quantize(model, GROUP, BITS, class_predicate=packing)
    for module in model.modules():
        if isinstance(module, QuantizedSwitchLinear):
            _randomize(module)
    return settings


def _randomize(layer: QuantizedSwitchLinear) -> None:
    """Let packed experts be random bits: to draw and pack their weights would take minutes."""
    weight, scales, biases = layer["weight"], layer["scales"], layer.get("biases")
    layer["weight"] = mx.random.randint(-(2**31), 2**31 - 1, weight.shape).view(mx.uint32)
    if biases is None:  # scales are exponents of two, of weights up to 6
        layer["scales"] = mx.full(scales.shape, 127 - 7, mx.uint8)
        return
    largest = (8 * weight.shape[-1]) ** -0.5
    layer["scales"] = mx.full(scales.shape, 2 * largest / 15, scales.dtype)
    layer["biases"] = mx.full(biases.shape, -largest, biases.dtype)


def checkpoint(
    cache: Path, shape: str, blocks: int, weights: str = "4bit", vocabulary: int | None = None
) -> Path:
    """Write a model of a shape with random weights, unless it exists.

    Args:
        cache: folder of random models.
        shape: a key of `SHAPES`.
        blocks: number of blocks.
        weights: one of `WEIGHTS`. 4bit has groups of 64 and scales and norms in bfloat16, as in
            published checkpoints.
        vocabulary: number of words; that of the shape by default.

    Returns:
        The folder of the model. It is created only when complete.

    Memory: the largest tensor and its computation.
    """
    words = vocabulary or SHAPES[shape][-1]
    fewer = f"-{words}-words" * (words != SHAPES[shape][-1])
    folder = cache / (f"{shape}-{blocks}" + f"-{weights}" * (weights != "4bit") + fewer)
    if (folder / "config.json").exists():
        return folder
    model, config = random_model(shape, blocks, weights, words)
    parameters = tree_flatten(model.parameters())
    del model
    remove_left_overs(cache)
    with temporary_folder(folder, 0o700) as building:
        write_model(building, parameters, config)
        os.replace(building, folder)
    return folder


def add_tokenizer(folder: Path, vocabulary: int) -> None:
    """Add a tokenizer of the words w0, w1, ... to a random model, unless it has one."""
    if (folder / "tokenizer.json").exists():
        return
    words = {f"w{index}": index for index in range(min(WORDS, vocabulary - 1))}
    end = {"id": vocabulary - 1, "content": "</s>", "special": True}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end | dict.fromkeys(flags, False)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": words | {"</s>": vocabulary - 1},
            "unk_token": "</s>",
        },
    }
    config = {
        "synthetic": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    texts = {"tokenizer_config.json": config, "tokenizer.json": tokenizer}
    write_atomically(
        {
            folder / name: lambda file, text=text: file.write(json.dumps(text).encode())
            for name, text in texts.items()
        }
    )
