"""Tiny models of transformers on disk, which mlx-lm loads as well."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
# What differs from COMMON, by architecture.
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 12},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "phi3": {"tie_word_embeddings": False, "sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": MIXTURE | {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen2_moe": MIXTURE
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 24},
}


def make_checkpoint(folder: Path, name: str, **changes) -> Path:
    """Write a random checkpoint as transformers writes it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = COMMON | FAMILIES[name] | changes
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    model.save_pretrained(folder)
    # mlx-lm reads these where transformers 4 wrote them.
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config |= {key: settings[key] for key in MIXTURE if key in settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_theirs(folder):
    """The model of transformers, with the arithmetic of mlx-lm."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if model.config.model_type == "gemma":  # mlx-lm has the exact GELU, transformers its tanh
        for block in model.model.layers:
            block.mlp.act_fn = torch.nn.GELU()
    return model


def torch_logits(model, tokens):
    """Logits [tokens, vocabulary] of a transformers or PEFT model, as a NumPy array."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def mlx_logits(folder, tokens, adapter=None):
    """Logits [tokens, vocabulary] of mlx-lm's model."""
    from mlx_lm.tuner.utils import load_adapters

    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return model(mx.array([tokens]))[0]
