"""Shapes of models whose blocks are not all alike: recurrent ones, convolutions, windows.

Figures are those of the published `config.json` files, except those of shapes named small, which
have the kinds of blocks of a family in a size that a CPU computes in seconds. With fewer blocks
than the model has, the kinds of its blocks take turns.
"""

from itertools import cycle, islice
from typing import Any

from mlx_lm.models import falcon_h1, gemma4_text, granitemoehybrid, lfm2, mamba, nemotron_h, qwen3_5

# Architecture, blocks, hidden size, intermediate size, heads, key-value heads, vocabulary.
SHAPES = {
    "qwen3.5-9b": (qwen3_5, 32, 4096, 12288, 16, 4, 248320),
    "granite-4.0-h-micro": (granitemoehybrid, 40, 2048, 8192, 32, 8, 100352),
    "falcon-h1-1.5b": (falcon_h1, 24, 2048, 4608, 8, 2, 65536),
    "lfm2-1.2b": (lfm2, 16, 2048, 8192, 32, 8, 65536),
    "nemotron-h-4b": (nemotron_h, 52, 3072, 12288, 32, 8, 131072),
    "nemotron-nano-9b-v2": (nemotron_h, 56, 4480, 15680, 40, 8, 131072),
    "mamba-1.4b": (mamba, 48, 2048, 4096, 1, 1, 50280),
    "gemma-4-31b": (gemma4_text, 60, 5376, 21504, 32, 16, 262144),
    "gemma-4-e4b": (gemma4_text, 42, 2560, 10240, 8, 2, 262144),
    "gemma-4-small": (gemma4_text, 12, 1024, 4096, 8, 2, 16384),
    "granite-4.0-h-small": (granitemoehybrid, 12, 768, 2048, 12, 4, 16384),
    "qwen3.5-small": (qwen3_5, 12, 1024, 3584, 8, 2, 16384),
}
UNTIED = ("qwen3.5-9b", "nemotron-h-4b", "nemotron-nano-9b-v2")
NEMOTRON = {
    "attention_bias": False,
    "head_dim": 128,
    "mamba_proj_bias": False,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "n_groups": 8,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "max_position_embeddings": 131072,
}
QWEN = {
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262144,
}
GRANITE = {
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "attention_bias": False,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "position_embedding_type": "nope",
    "max_position_embeddings": 131072,
}
GEMMA = {
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 131072,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3.5-9b": QWEN | {"linear_num_value_heads": 32},
    "qwen3.5-small": QWEN | {"linear_num_value_heads": 16},
    "granite-4.0-h-micro": GRANITE
    | {"shared_intermediate_size": 8192, "mamba_n_heads": 64, "mamba_d_head": 64},
    "granite-4.0-h-small": GRANITE
    | {"shared_intermediate_size": 2048, "mamba_n_heads": 48, "mamba_d_head": 32},
    "falcon-h1-1.5b": {
        "head_dim": 128,
        "mamba_d_ssm": 3072,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 256,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
    },
    "lfm2-1.2b": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 2048,
        "block_ff_dim": 12288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "max_position_embeddings": 128000,
    },
    "nemotron-h-4b": NEMOTRON | {"mamba_num_heads": 112, "mamba_head_dim": 64},
    "nemotron-nano-9b-v2": NEMOTRON | {"mamba_num_heads": 128, "mamba_head_dim": 80},
    "mamba-1.4b": {
        "state_size": 16,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 128,
    },
    "gemma-4-31b": GEMMA
    | {
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    },
    "gemma-4-e4b": GEMMA
    | {
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "use_double_wide_mlp": False,
    },
    "gemma-4-small": GEMMA
    | {
        "head_dim": 128,
        "global_head_dim": 256,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 16384,
        "use_double_wide_mlp": False,
    },
}
# The name of the setting that lists the kinds of blocks, and the kinds that take turns.
TURNS = {
    "granite-4.0-h-micro": ("layer_types", ("mamba", "attention")),
    "granite-4.0-h-small": ("layer_types", ("mamba", "mamba", "attention")),
    "lfm2-1.2b": ("layer_types", ("conv", "full_attention")),
    "nemotron-h-4b": ("hybrid_override_pattern", ("M", "-", "*")),
    "nemotron-nano-9b-v2": ("hybrid_override_pattern", ("M", "-", "*")),
    "gemma-4-31b": ("layer_types", ("sliding_attention", "full_attention")),
    "gemma-4-e4b": ("layer_types", ("sliding_attention", "full_attention")),
    "gemma-4-small": ("layer_types", ("sliding_attention", "full_attention")),
}


def settings_of(shape: str, blocks: int) -> dict[str, Any]:
    """The settings of a shape that depend on its kinds of blocks; none for another shape."""
    found = dict(SETTINGS.get(shape, {}))
    if shape in TURNS:
        name, kinds = TURNS[shape]
        found[name] = list(islice(cycle(kinds), blocks))
    if shape in ("gemma-4-e4b", "gemma-4-small"):  # 18 of 42 read keys and values of earlier ones
        found["num_kv_shared_layers"] = min(18, max(0, blocks - len(TURNS[shape][1])))
    if shape in ("qwen3.5-9b", "qwen3.5-small"):  # every fourth, or of fewer blocks the last one
        found["full_attention_interval"] = max(2, min(4, blocks))
    return found
