"""What the planner knows of mixtures of experts."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from architectures import build, quantizable

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape


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


def test_groups_of_experts_are_not_in_the_buffers_of_blocks():
    _, shape = shape_of_a_mixture()
    shape = replace(shape, expert_bytes=10**9, block_bytes=10**9 + 10**6, one_expert_bytes=10**7)
    batch_shape = BatchShape(1, 64, 20)

    def peak(mlp_bytes):
        return Memory(shape, batch_shape, Plan(mlp_bytes=mlp_bytes, prefetch=False)).peak()[0]

    assert peak(None) > 10**9
    # A group holds one expert at least.
    assert 10**7 < peak(1) < 10**8
