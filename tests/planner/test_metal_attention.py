"""What MLX's gradient of attention takes on Metal, and how long one operation may: faked Macs."""

import os
from dataclasses import replace
from math import inf

import mlx.core as mx
import pytest
from architectures import build
from harness import engine, random_batch, save
from test_search import LOAD, RATES, SHAPE

from mlx_edgelora import TrainConfig, finetune
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.layers import fused
from mlx_edgelora.layers.fused import BLOCK_VARIABLE, Backend, set_attention_block
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.duration import longest_operation, seconds
from mlx_edgelora.planner.machine import LONGEST, Machine, Rates, this_machine
from mlx_edgelora.planner.measured import Measurement, Measurements
from mlx_edgelora.planner.needs import need
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import plan, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

METAL = Backend("metal", (0, 32, 4), architecture="applegpu_g13g", macos=(15, 6))
ON_METAL = replace(SHAPE, blocked_heads=24)
KERNELS = ("fused", "dequantize")
GPU = Machine("a GPU", RATES, KERNELS)
# Eight cores of an M1.
M1 = Machine("M1", Rates(1.8e12, 1.8e12, 1e10, 6e10, 3e9, 3e9, 5e-6), KERNELS, "", LONGEST)


def scores(batch_shape, **choices):
    """Bytes that blocks of scores add to a backward by a plan, by phase."""
    found = {}
    for shape in (SHAPE, ON_METAL):
        for phase in Memory(shape, batch_shape, Plan(**choices)).phases():
            known = found.setdefault((phase.name, phase.block), [])
            known.append(phase.need.value)
    return {key: round(more - less) for key, (less, more) in found.items() if more != less}


@pytest.mark.parametrize(
    ("batch_shape", "choices", "size"),
    [
        (BatchShape(1, 2048, 600), {}, 150_994_944),
        (BatchShape(4, 2048, 600), {"attention_block": 1024}, 603_979_776),
        (BatchShape(4, 2048, 600), {"micro_batches": 4}, 150_994_944),
        (BatchShape(1, 2048, 600), {"attention_block": 256}, 9_437_184),
        (BatchShape(1, 2048, 600), {"tile_tokens": 512}, 75_497_472),
        (BatchShape(2, 2048, 600), {"tile_tokens": 512}, 75_497_472),
        (BatchShape(1, 96, 96), {}, 3 * 24 * 96 * 96 * 2),
    ],
)
def test_the_cost_of_blocks_of_scores(batch_shape, choices, size):
    """3 x B x H x block^2 values, in every backward of a block."""
    found = scores(batch_shape, **choices)
    assert set(found) == {("backward", index) for index in range(28)}
    assert set(found.values()) == {size}


def test_kept_blocks_have_them_once():
    found = scores(BatchShape(1, 2048, 600), kept_blocks=28, streamed_blocks=0)
    assert found == {("backward", 0): 150_994_944}


def test_elsewhere_nothing_changes():
    for machine in (GPU, replace(GPU, kernels=("dequantize",))):
        choice = plan(SHAPE, LOAD, machine, 10**9)
        assert choice.plan.attention_block is None
        assert "attention gradient" not in choice.plan.rows(28)
        other = replace(choice.plan, attention_block=256)
        assert Memory(SHAPE, LOAD, other).peak() == Memory(SHAPE, LOAD, choice.plan).peak()
        assert seconds(SHAPE, LOAD, other, machine) == choice.seconds


def test_blocks_are_small_where_the_budget_is():
    least = smallest(ON_METAL, LOAD, GPU)
    assert least.plan.attention_block == 256
    assert plan(ON_METAL, LOAD, GPU, least.needs).plan.attention_block == 256
    rich = plan(ON_METAL, LOAD, GPU, 10**11)
    assert rich.plan.attention_block == 1024
    assert rich.plan.rows(28)["attention gradient"] == "1024 x 1024 scores at a time"
    asked = plan(ON_METAL, LOAD, GPU, 10**11, {"attention_block": 512})
    assert asked.plan.attention_block == 512 and asked.seconds >= rich.seconds


@pytest.mark.parametrize("choices", [{}, {"tile_tokens": 512}, {"kept_blocks": 4}])
def test_what_was_measured_with_other_blocks_is_told_apart(choices):
    small, large = (Plan(attention_block=size, **choices) for size in (256, 1024))
    memory = Memory(ON_METAL, LOAD, large)
    name = "tail" if choices.get("kept_blocks") else "backward"
    known, kind, way = Measurements(), memory.kind(name), memory.ways[name]
    known.add(kind, way, LOAD, Measurement(10**9, 1.0))
    assert known.find(kind, Memory(ON_METAL, LOAD, small).ways[name], LOAD) is None
    assert known.find(kind, way, LOAD) == Measurement(10**9, 1.0)
    assert need(kind, ON_METAL, way, LOAD) > need(kind, SHAPE, way, LOAD)


@pytest.mark.parametrize(
    ("name", "changes", "heads"),
    [
        ("llama", {"head_dim": 64}, 4),
        ("llama", {"head_dim": 16}, 0),  # MLX has no kernel for such heads
        ("gpt_oss", {"head_dim": 64}, 0),  # nor a gradient of sinks
    ],
)
def test_the_shape_of_a_model_says_whether_there_are_any(name, changes, heads, monkeypatch):
    model = build(name, **changes)
    model.set_dtype(mx.bfloat16)  # for which CUDA has a fused gradient, without blocks
    model.freeze()
    add_lora(model, -1, 4)
    blocks = checked_blocks(model)
    assert shape_of(blocks, 101).blocked_heads == 0
    monkeypatch.setattr(Backend, "here", classmethod(lambda cls: METAL))
    assert shape_of(blocks, 101).blocked_heads == heads
    cuda = Backend("cuda", (0, 32, 4), 9)
    monkeypatch.setattr(Backend, "here", classmethod(lambda cls: cuda))
    assert shape_of(blocks, 101).blocked_heads == 0


@pytest.mark.parametrize("before", [None, "777"])
def test_the_engine_sets_the_block_before_a_gradient_and_puts_it_back(
    before, tmp_path, monkeypatch
):
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(BLOCK_VARIABLE, before)
    seen, vjp = [], mx.vjp

    def spy(*args):
        seen.append(os.environ.get(BLOCK_VARIABLE))
        return vjp(*args)

    monkeypatch.setattr(mx, "vjp", spy)
    ours = engine(save(tmp_path, "llama", False), attention_block=256)
    seen.clear()  # those of the model's checks: nothing is computed there
    ours.value_and_grad(random_batch())
    assert seen and set(seen) == {"256"}
    seen.clear()
    for size, value in ((1024, "1024"), (None, before)):
        ours.plan_for = lambda batch, size=size: Plan(attention_block=size)
        ours.value_and_grad(random_batch())
        assert set(seen) == {value}
        seen.clear()
    ours.set_plan(Plan(attention_block=256))
    ours.close()
    assert os.environ.get(BLOCK_VARIABLE) == before
    set_attention_block(None)
    assert os.environ.get(BLOCK_VARIABLE) == before


@pytest.mark.slow
@pytest.mark.alone  # what a step holds is measured, and decides which plan is next
@pytest.mark.parametrize(
    "budget",
    ["min", *(pytest.param(budget, marks=pytest.mark.slow) for budget in ("20MB", None))],
)
def test_a_run_on_a_mac(budget, tmp_path, monkeypatch):
    """But for what MLX computes: the plan says the block, gradients have it, nothing is left."""
    monkeypatch.setattr(Backend, "here", classmethod(lambda cls: METAL))
    sizes = fused.METAL_SIZES | {(16, 16), (32, 32)}  # those of the embedded model
    monkeypatch.setattr(fused, "METAL_SIZES", sizes)
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    seen, said, backward = [], [], Engine.backward

    def spy(engine, *args):
        seen.append((engine.plan.attention_block, os.environ[BLOCK_VARIABLE]))
        return backward(engine, *args)

    monkeypatch.setattr(Engine, "backward", spy)
    options = {"iters": 2, "batch_size": 2, "adapter_path": str(tmp_path), "verbose": True}
    finetune(TrainConfig.from_dict(options | {"memory_budget": budget}), [], said.append)
    assert all(str(planned) == used for planned, used in seen)
    if budget == "20MB":  # what is measured may lead to another plan, after the first was told
        block = seen[0][0]
    else:
        block = seen[-1][0]
        assert block == (256 if budget == "min" else 1024)
    assert any(f"attention gradient  {block} x {block} scores" in line for line in said)
    assert BLOCK_VARIABLE not in os.environ


def test_of_equally_small_plans_a_gpu_gets_the_larger_tiles_of_the_head():
    """Each tile takes time there; on a CPU small ones were nearer to what is expected."""
    batch_shape = BatchShape(1, 1024, 307)
    assert smallest(SHAPE, batch_shape, GPU).plan.loss_bytes == 40 * MIB
    cpu = replace(GPU, kernels=("dequantize",))
    assert smallest(SHAPE, batch_shape, cpu).plan.loss_bytes == 16 * MIB


def test_long_operations_are_made_shorter_by_tiles_on_metal_alone():
    """Of 16k tokens of a 3B model on an M1 one gradient of attention would take 2.3 s."""
    batch_shape, budget = BatchShape(1, 16384, 4000), 10**12
    whole = Plan(kept_blocks=28, streamed_blocks=0)
    assert longest_operation(ON_METAL, batch_shape, whole, M1) == pytest.approx(2.3, abs=0.05)
    assert longest_operation(SHAPE, batch_shape, whole, M1) == pytest.approx(0.46, abs=0.01)
    found = plan(ON_METAL, batch_shape, M1, budget).plan
    assert found.tile_tokens == 1024
    assert longest_operation(ON_METAL, batch_shape, found, M1) <= LONGEST
    assert longest_operation(ON_METAL, batch_shape, replace(found, tile_tokens=2048), M1) > LONGEST
    for shape, machine in ((SHAPE, replace(M1, longest=inf)), (ON_METAL, GPU)):
        assert plan(shape, batch_shape, machine, budget).plan.kept_blocks == 28
    # Products alone: 8k tokens of a 70B model.
    large = replace(SHAPE, hidden=8192, queries=8192, intermediate=28672)
    assert plan(large, BatchShape(1, 8192, 800), M1, budget).plan.tile_tokens == 1024
    # Where no way is short enough the shortest ones are left.
    slow = replace(M1, rates=replace(M1.rates, flops=1e9, fused_flops=1e9))
    assert plan(ON_METAL, batch_shape, slow, budget).plan.tile_tokens == 256


def test_short_texts_on_a_mac_are_computed_as_elsewhere():
    batch_shape = BatchShape(1, 2048, 600)
    free = replace(M1, longest=inf)
    for budget in (10**9, 10**12):
        assert plan(ON_METAL, batch_shape, M1, budget) == plan(ON_METAL, batch_shape, free, budget)


def test_only_a_mac_has_a_longest_operation(tmp_path, monkeypatch):
    assert this_machine(tmp_path, tmp_path, mx.float32).longest == inf
    on_gpu = mx.default_device() == mx.gpu
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert this_machine(tmp_path, tmp_path, mx.float32).longest == (LONGEST if on_gpu else inf)
    if not on_gpu:
        monkeypatch.setattr(mx, "gpu", mx.cpu)
        assert this_machine(tmp_path, tmp_path, mx.float32).longest == LONGEST
