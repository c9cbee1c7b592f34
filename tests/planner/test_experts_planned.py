"""What the planner knows of mixtures of experts."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from architectures import build, quantizable
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.needs import need
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

LORA = ("lora_a", "lora_b")


def shape_of_a_mixture():
    model = build("qwen3_moe", mlp_only_layers=[])
    nn.quantize(model, **quantizable())
    add_lora(model, -1, rank=4)
    return model, shape_of(checked_blocks(model), 101, mx.float32)


def test_sizes_of_experts():
    model, shape = shape_of_a_mixture()
    experts = model.layers[0].mlp.switch_mlp
    layers = [experts[name].linear for name in ("gate_proj", "up_proj", "down_proj")]
    held = sum(layer[n].nbytes for layer in layers for n in ("weight", "scales", "biases"))
    assert shape.expert_bytes == held and shape.one_expert_bytes == held // 4
    assert shape.rank == 4 and shape.gated
    assert 0 < shape.expert_bytes < shape.block_bytes
    adapters = [
        experts[name][key] for name in ("gate_proj", "up_proj", "down_proj") for key in LORA
    ]
    assert shape.expert_adapter_bytes == sum(array.nbytes for array in adapters)
    assert shape.expert_adapter_bytes < shape.adapter_bytes


def test_what_experts_give_is_known_for_all_that_a_token_picks():
    model, shape = shape_of_a_mixture()
    mlp = model.layers[0].mlp
    outputs = sum(
        mlp.switch_mlp[name].linear["weight"].shape[1] for name in ("gate_proj", "up_proj")
    )
    outputs += model.args.hidden_size
    assert shape.routed == mlp.top_k * outputs
    batch_shape, way = BatchShape(1, 64, 20), (3, MIB, "fused", "resident", None)
    more = need("tail", replace(shape, routed=2 * shape.routed), way, batch_shape)
    before = need("tail", shape, way, batch_shape)
    assert more - before > 2 * 2 * 64 * shape.routed * shape.itemsize  # of two blocks, twice
    dense = build("llama")
    add_lora(dense, -1, rank=4)
    assert shape_of(checked_blocks(dense), 101, mx.float32).routed == 0


def test_gradients_of_experts_are_expected_once():
    _, shape = shape_of_a_mixture()
    shape = replace(shape, adapter_bytes=10**9 + 10**6, expert_adapter_bytes=10**9)
    for tile_tokens in (None, 16):
        plan = Plan(mlp_bytes=1, tile_tokens=tile_tokens, adapters="paged")
        phases = Memory(shape, BatchShape(1, 64, 20), plan).phases()
        needs = {phase.name: phase.need.value for phase in phases}
        assert 10**9 < needs["backward"] < 1.1 * 10**9


def test_groups_of_experts_are_not_in_the_buffers_of_blocks():
    _, shape = shape_of_a_mixture()
    shape = replace(shape, expert_bytes=10**9, block_bytes=10**9 + 10**6, one_expert_bytes=10**7)
    batch_shape = BatchShape(1, 64, 20)

    def peak(mlp_bytes):
        return Memory(shape, batch_shape, Plan(mlp_bytes=mlp_bytes, prefetch=False)).peak()[0]

    assert peak(None) > 10**9
    # A group holds one expert at least.
    assert 10**7 < peak(1) < 10**8


def test_of_blocks_that_differ_each_counts_its_own_bytes():
    """Block 1 has no experts; the largest one, counted three times, would be far too much."""
    model = build("qwen3_moe", mlp_only_layers=[1])
    nn.quantize(model, **quantizable())
    add_lora(model, -1, rank=4)
    shape = shape_of(checked_blocks(model), 101, mx.float32)
    trained = [
        sum(a.nbytes for _, a in tree_flatten(block.trainable_parameters()))
        for block in model.layers
    ]
    every = [sum(a.nbytes for _, a in tree_flatten(block.parameters())) for block in model.layers]
    frozen = [own - adapters for own, adapters in zip(every, trained, strict=True)]
    assert frozen[1] < frozen[0] and shape.block_bytes == frozen[0]
    batch_shape = BatchShape(1, 8, 2)

    def base(**choices):
        return Memory(shape, batch_shape, Plan(**choices)).base

    one = base(streamed_blocks=3, prefetch=False) - base(streamed_blocks=2, prefetch=False)
    assert one == -frozen[2]
    two = base(streamed_blocks=2, prefetch=False) - base(streamed_blocks=1, prefetch=False)
    assert two == -frozen[1]
    both = base(adapters="resident") - base(adapters="paged")
    assert both == 3 * sum(trained)
    # Read in groups, experts have memory of their own; block 1 is then the largest one.
    ring = [base(mlp_bytes=mlp_bytes, prefetch=False) for mlp_bytes in (None, 1)]
    assert ring[0] - ring[1] == frozen[0] - max(frozen[0] - shape.expert_bytes, frozen[1])
    assert len(shape_of_a_mixture()[1].by_block) == 0
