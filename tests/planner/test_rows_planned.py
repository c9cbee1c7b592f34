"""MLPs that are read by rows in the planner: which can be, and when they are."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build, quantizable
from test_search import MACHINE, SHAPE

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.duration import seconds
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import expected, plan, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

BATCH = BatchShape(1, 2048, 600)
READABLE = replace(SHAPE, row_bytes=SHAPE.mlp_bytes)


@pytest.mark.parametrize(
    ("name", "lora", "readable"),
    [
        ("llama", {}, True),
        ("llama", {"dropout": 0.1}, False),
        ("phi3", {}, False),  # no gated MLP
        ("qwen3_next", {}, False),  # experts beside it
    ],
)
def test_which_bytes_can_be_read_by_rows(name, lora, readable):
    model = build(name)
    nn.quantize(model, **quantizable())
    add_lora(model, -1, rank=4, **lora)
    shape = shape_of(checked_blocks(model), 101, mx.float32)
    assert shape.row_bytes == (shape.mlp_bytes if readable else 0)
    assert bool(shape.row_bytes) == readable


def test_the_smallest_plan_reads_rows_in_short_tiles():
    """Where a model allows it, whatever else its blocks do."""
    found = smallest(READABLE, BATCH, MACHINE)
    assert (found.plan.mlp_weights, found.plan.tile_tokens) == ("rows", 128)
    assert found.needs < smallest(SHAPE, BATCH, MACHINE).needs - 0.7 * SHAPE.mlp_bytes
    assert smallest(SHAPE, BATCH, MACHINE).plan.mlp_weights == "block"
    fixed = {"mlp_bytes": None}  # as for a kernel that the user chose
    assert smallest(READABLE, BATCH, MACHINE, fixed).plan.mlp_weights == "block"


def test_long_rows_sum_the_gradients_of_some_keys_at_a_time():
    long = BatchShape(1, 8192, 600)
    found = smallest(READABLE, long, MACHINE)
    assert (found.plan.key_tokens, found.plan.tile_tokens) == (2048, 128)
    most = BatchShape(1, 16384, 4915)  # whose head is the peak by the formula
    assert smallest(READABLE, most, MACHINE).plan.tile_tokens == 128
    assert smallest(READABLE, BATCH, MACHINE).plan.key_tokens is None
    whole = replace(found.plan, key_tokens=None)
    arguments = READABLE, long, MACHINE
    saved = 4 * (8192 - 2048) * READABLE.keys
    assert expected(*arguments, whole).peak - found.peak == saved
    assert expected(*arguments, whole).seconds < found.seconds  # and writes nothing for it
    # Without a file there is nothing to leave for later.
    memory = [replace(plan, inputs="memory") for plan in (whole, found.plan)]
    assert expected(*arguments, memory[0]).peak == expected(*arguments, memory[1]).peak


def test_a_gpu_does_not_wait_for_rows_nor_anything_for_rows_that_are_not_packed():
    gpu = replace(MACHINE, kernels=("fused", "dequantize"))
    assert smallest(READABLE, BATCH, gpu).plan.mlp_weights == "block"
    dense = replace(READABLE, packed=False)
    assert smallest(dense, BATCH, MACHINE).plan.mlp_weights == "block"


def test_more_memory_reads_them_with_their_block():
    least = smallest(READABLE, BATCH, MACHINE)
    found = plan(READABLE, BATCH, MACHINE, 2 * least.needs)
    assert found.plan.mlp_weights == "block" and found.seconds < 0.7 * least.seconds


def test_every_tile_reads_the_rows_again():
    def cost(shape, tile_tokens, weights="rows"):
        settings = {"mlp_bytes": 8 * MIB, "loss_bytes": 8 * MIB, "tile_tokens": tile_tokens}
        settings |= {"prefetch": False, "adapters": "paged"}
        tried = Plan(mlp_weights=weights, **settings)
        return Memory(shape, BATCH, tried).peak()[0], seconds(shape, BATCH, tried, MACHINE)

    assert cost(READABLE, 128)[1] > cost(READABLE, 256)[1] > cost(READABLE, 256, "block")[1]
    assert cost(READABLE, 128)[0] < cost(READABLE, 256)[0] < cost(READABLE, 256, "block")[0]
