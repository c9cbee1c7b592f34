"""Recurrent blocks in the planner: the size of their states, and tiles short enough for them."""

from dataclasses import replace

import mlx.core as mx
import pytest
from architectures import build
from test_search import SHAPE

from mlx_edgelora.benchmark.shapes import random_model
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.model.weights import ResidentWeights
from mlx_edgelora.planner.machine import Machine, Rates
from mlx_edgelora.planner.needs import need
from mlx_edgelora.planner.plan import MIB
from mlx_edgelora.planner.search import smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

MACHINE = Machine("a CPU", Rates(1e11, 1e11, 1e10, 1e10, 1e9, 1e9, 0.0), ("dequantize",))
BATCH = BatchShape(1, 2048, 600)


@pytest.mark.parametrize(("name", "has_states"), [("qwen3_next", True), ("llama", False)])
def test_the_size_of_states_is_that_of_the_trial(name, has_states):
    model = build(name)
    add_lora(model, -1, rank=4)
    blocks = checked_blocks(model)
    found = shape_of(blocks, 101, mx.float32)
    choices = [Tiling(blocks, [ResidentWeights()]).tileable(index) for index in range(3)]
    expected = [choice.recurrence.state_bytes for choice in choices if choice.recurrence]
    assert (found.state_bytes, found.recurrent > 0) == (max(expected, default=0), has_states)


def test_more_states_take_more_memory_and_shorter_tiles():
    recurrent = replace(SHAPE, state_bytes=2 * MIB, recurrent=8192)
    plans = [smallest(shape, BATCH, MACHINE).plan for shape in (SHAPE, recurrent)]
    assert [plan.tile_tokens for plan in plans] == [256, 128]
    larger = replace(recurrent, state_bytes=8 * MIB)
    way = (128, MIB, "dequantize", False, None, "block", "file")
    needs = [need("tiles backward", shape, way, BATCH) for shape in (SHAPE, recurrent, larger)]
    assert needs[0] < needs[1] < needs[2]
    kept = [need("tail", s, (3, MIB, "fused", "resident", None), BATCH) for s in (SHAPE, recurrent)]
    assert kept[1] - kept[0] > 2 * BATCH.size * 8192 * 4  # of the two blocks before the last one


def test_a_hidden_state_is_as_wide_as_what_blocks_are_given():
    """A norm inside a Mamba 2 block is wider."""
    model, config = random_model("granite-4.0-h-small", 1, "float32")  # nothing is evaluated
    add_lora(model, -1, rank=4)
    assert model.layers[0].mamba.norm.weight.size > config["hidden_size"]
    shape = shape_of(checked_blocks(model), config["vocab_size"], mx.float32)
    assert shape.hidden == config["hidden_size"]
