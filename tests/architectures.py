"""Tiny random models of many architectures, as configs that `mlx_lm` builds."""

import importlib

import mlx.core as mx
import mlx.nn as nn
from backends import exact_reference
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

# Of every kind of attention, mask and MLP one; the others carry the mark of slow tests.
EACH_KIND = (
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    "olmo_hybrid",
)

# name -> what differs from BASE
CONFIGS = {
    "llama": {
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": {"original_max_position_embeddings": 128, "partial_rotary_factor": 1.0},
    "ministral3": {
        "layer_types": SLIDING,
        "sliding_window": 5,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "cohere2": {
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "layer_norm_eps": 1e-5,
        "layer_norm_bias": False,
        "attention_bias": False,
        "logit_scale": 0.25,
    },
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS
    | {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 3,
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": SLIDING,
        "rope_scaling": None,
    },
    # Rotary scores go into attention as a floating mask.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "rope_scaling": None,
    },
    # Its loop asks for the class of its blocks.
    "olmo_hybrid": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 3,
        "linear_allow_neg_eigval": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}


def config(name: str) -> dict:
    return BASE | {"model_type": name} | CONFIGS[name]


def build(name: str, seed: int = 0, **changes) -> nn.Module:
    """A random float32 model; every parameter random, norms included."""
    architecture = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = architecture.Model(architecture.ModelArgs.from_dict(config(name) | changes))
    model.update(tree_map_with_path(_random, model.parameters()))
    mx.eval(model.parameters())
    return model


def narrow_llama(depth: int) -> nn.Module:
    """A Llama of so many blocks, as wide as its peaks need to be seen above their jitter."""
    return build(
        "llama",
        num_hidden_layers=depth,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=8,
        tie_word_embeddings=True,
        vocab_size=256,
    )


def _random(name: str, value: mx.array) -> mx.array:
    if value.ndim > 1:
        inputs = value.shape[-1] if value.shape[-1] > 1 else value.shape[-2]  # a convolution's
        return mx.random.normal(value.shape) * (0.5 / inputs**0.5)
    return value + 0.1 * mx.random.normal(value.shape)


def quantizable(bits: int = 4, group_size: int = 32):
    """A predicate for `nn.quantize` that passes over matrices too narrow for the group."""

    def predicate(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    return {"bits": bits, "group_size": group_size, "class_predicate": predicate}


def add_lora(model: nn.Module, num_layers: int = -1, keys=None, dropout: float = 0.0) -> None:
    """mlx-lm's LoRA layers on the last blocks, with random (non-zero) B matrices."""
    model.freeze()
    settings = {"rank": 4, "scale": 3.0, "dropout": dropout}
    if keys is not None:
        settings["keys"] = keys
    count = len(model.layers) if num_layers == -1 else num_layers
    linear_to_lora_layers(model, count, settings)
    exact_reference(model)
    mx.random.seed(7)
    trained = tree_flatten(model.trainable_parameters())
    model.load_weights(
        [(k, 0.05 * mx.random.normal(v.shape) if "lora_b" in k else v) for k, v in trained],
        strict=False,
    )
    mx.eval(model.parameters())
    model.train()


def relative_error(got: mx.array, expected: mx.array) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = mx.linalg.norm((got - expected).astype(mx.float32).reshape(-1)).item()
    return difference / max(mx.linalg.norm(expected.astype(mx.float32).reshape(-1)).item(), 1e-12)
