"""Settings of the shapes that are mixtures of experts, or attend by latents.

Those named small are of no model; a CPU computes them in seconds.
"""

# Other settings than those that all shapes have.
EXPERTS = {
    "qwen3-30b-a3b": {
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    },
    "qwen3-moe-small": {
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 384,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    },
    "gpt-oss-20b": {
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_scaling": None,
    },
    # A block of all 256 experts is 6 GB; a step's memory depends on their number by adapters alone.
    "deepseek-v3-16-experts": {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 0,
        "max_position_embeddings": 163840,
        "rope_scaling": None,
    },
    # As in DeepSeek's models, the first block has no experts.
    "deepseek-small": {
        "q_lora_rank": 384,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 512,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163840,
        "rope_scaling": None,
    },
}
# Shapes whose experts are packed in another way.
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
PACKED_EXPERTS = {"gpt-oss-20b": MXFP4}
