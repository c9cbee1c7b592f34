"""What the planner knows of latent attention."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build, quantizable
from test_search import LOAD, MACHINE, SHAPE

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.search import TILES, WIDE_TILES, smallest
from mlx_edgelora.planner.shape import shape_of

# Sizes of a head's queries, of their rotary part, of its values, and of latents.
NOPE, ROTARY, VALUE, LATENTS = 16, 8, 24, 32
SIZES = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROTARY, "v_head_dim": VALUE}


@pytest.mark.parametrize("heads", [4, 20])
def test_latents_are_in_memory_and_not_keys_and_values_of_heads(heads):
    changes = SIZES | {"num_attention_heads": heads, "num_key_value_heads": heads}
    model = build("deepseek_v3", kv_lora_rank=LATENTS, **changes)
    nn.quantize(model, **quantizable())
    add_lora(model, -1, rank=4)
    shape = shape_of(checked_blocks(model), 101, mx.float32)
    assert shape.keys == LATENTS + ROTARY
    assert shape.queries == heads * (NOPE + ROTARY)
    assert shape.expanded == heads * (NOPE + VALUE)


def test_keys_and_values_of_other_attention_are():
    model = build("llama")
    add_lora(model, -1, rank=4)
    attention = model.layers[0].self_attn
    shape = shape_of(checked_blocks(model), 101, mx.float32)
    assert shape.keys == 2 * attention.k_proj.linear.weight.shape[0]
    assert shape.expanded == 0
    assert shape.queries == attention.q_proj.linear.weight.shape[0]


def test_the_least_memory_has_short_tiles_where_queries_are_wide():
    for queries, least in ((2 * SHAPE.hidden, TILES), (2 * SHAPE.hidden + 1, WIDE_TILES)):
        found = smallest(replace(SHAPE, queries=queries), LOAD, MACHINE).plan
        assert found.tile_tokens == least[0]
