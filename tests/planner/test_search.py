"""The planner as a pure function: what fits, the fastest of it, and words where nothing does."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.duration import seconds
from mlx_edgelora.planner.machine import Machine, Rates
from mlx_edgelora.planner.measured import Measurements
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import SLACK, expected, largest_that, plan, smallest
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

RATES = Rates(3e12, 2e12, 1e11, 1e11, 3e9, 3e9, 2e-6)
MACHINE = Machine("a machine", RATES)
# Llama-3.2-3B, 4-bit in groups of 64, rank 16 on all blocks, in bfloat16.
SHAPE = ModelShape(
    blocks=28,
    adapted=28,
    hidden=3072,
    queries=3072,
    keys=2048,
    intermediate=8192,
    vocabulary=128256,
    rank=16,
    block_bytes=56647680,
    mlp_bytes=42467328,
    block_weights=100663296,
    mlp_weights=75497472,
    head_bytes=221626368,
    head_entries=394002432,
    packed=True,
    head_packed=True,
    outside_bytes=12288,
    adapter_bytes=3473408,
    mlp_adapter_bytes=2162688,
    outside_adapter_bytes=0,
    itemsize=2,
    gated=True,
)
LOAD = BatchShape(4, 2048, 2400)
GB = 10**9

SHAPES = st.builds(
    lambda blocks, adapted, **changes: replace(
        SHAPE, blocks=blocks, adapted=min(blocks, adapted), **changes
    ),
    blocks=st.integers(1, 80),
    adapted=st.integers(1, 80),
    packed=st.booleans(),
    gated=st.booleans(),
    accumulates=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
    row_bytes=st.sampled_from([0, SHAPE.mlp_bytes]),
)
LOADS = st.builds(
    lambda rows, tokens, share: BatchShape(rows, tokens, max(1, int(share * rows * tokens))),
    rows=st.integers(1, 16),
    tokens=st.sampled_from([31, 128, 511, 1024, 4096]),
    share=st.floats(0, 1),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(SHAPES, LOADS, st.lists(st.floats(1, 200), min_size=2, max_size=6))
def test_larger_budgets_give_faster_plans_that_fit(shape, batch_shape, factors):
    least = smallest(shape, batch_shape, MACHINE)
    before = None
    for factor in sorted(factors):
        budget = round(factor * least.needs)
        found = plan(shape, batch_shape, MACHINE, budget)
        assert found.needs <= budget
        assert (found.peak, found.needs - SLACK) == Memory(shape, batch_shape, found.plan).peak()
        assert found.seconds == seconds(shape, batch_shape, found.plan, MACHINE)
        assert before is None or found.seconds <= before + 2e-6
        before = found.seconds


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(SHAPES, LOADS)
def test_the_smallest_budget_works_and_none_below_it(shape, batch_shape):
    least = smallest(shape, batch_shape, MACHINE)
    assert plan(shape, batch_shape, MACHINE, least.needs).needs == least.needs
    with pytest.raises(EdgeLoraError, match="memory_budget: got"):
        plan(shape, batch_shape, MACHINE, least.needs - 1)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(SHAPES, LOADS, st.floats(1, 30), st.data())
def test_no_random_plan_that_fits_is_faster(shape, batch_shape, factor, data):
    budget = round(factor * smallest(shape, batch_shape, MACHINE).needs)
    found = plan(shape, batch_shape, MACHINE, budget)
    for _ in range(60):
        tiles = data.draw(st.sampled_from([None, 512, 1024, 2048]))
        other = Plan(
            streamed_blocks=data.draw(st.integers(0, shape.blocks)),
            head=data.draw(st.sampled_from(["streamed", "resident"])),
            prefetch=data.draw(st.booleans()),
            kept_blocks=0 if tiles else data.draw(st.integers(0, shape.adapted)),
            inputs=data.draw(st.sampled_from(["memory", "file"])),
            adapters=data.draw(st.sampled_from(["resident", "paged"])),
            tile_tokens=tiles,
            mlp_bytes=data.draw(st.sampled_from([None, 16 * MIB])),
        )
        if Memory(shape, batch_shape, other).peak()[1] + SLACK <= budget:
            assert seconds(shape, batch_shape, other, MACHINE) >= 0.99 * found.seconds


def test_plenty_is_plain_backpropagation():
    found = plan(SHAPE, LOAD, MACHINE, 10**12).plan
    assert found.kept_blocks == 28 and found.streamed_blocks == 0 and found.head == "resident"
    assert (found.adapters, found.tile_tokens, found.micro_batches) == ("resident", None, 1)


def test_the_search_looks_at_few_of_many_plans(monkeypatch):
    """A thousand ways, each with up to 16 fills: all that fit took 16,570 looks, 4337 do."""
    shape, batch_shape = replace(SHAPE, blocks=63, adapted=63), BatchShape(12, 1024, 12 * 300)
    budget, looked_at = 40 * smallest(shape, batch_shape, MACHINE).needs, []
    peak = Memory.peak
    monkeypatch.setattr(Memory, "peak", lambda memory: looked_at.append(1) or peak(memory))
    plan(shape, batch_shape, MACHINE, budget)
    assert len(looked_at) < 8000


def test_choices_that_are_made_already_are_kept():
    fixed = {"streamed_blocks": None, "head": "streamed", "inputs": "file", "adapters": "paged"}
    found = plan(SHAPE, LOAD, MACHINE, 10**11, fixed | {"kept_blocks": 0, "mlp_bytes": None}).plan
    assert {name: getattr(found, name) for name in fixed} == fixed
    assert (found.kept_blocks, found.mlp_bytes) == (0, None)


def test_the_kernel_is_the_faster_one_where_there_are_two():
    """Packed products take 50 % longer; unpacking pays for itself from some tokens on."""
    both = replace(MACHINE, kernels=("fused", "dequantize"))
    for tokens, kernel in ((16, "fused"), (8192, "dequantize")):
        batch_shape = BatchShape(1, tokens, tokens)
        found = plan(SHAPE, batch_shape, both, 10**12)
        assert found.plan.kernel == kernel
        assert plan(SHAPE, batch_shape, MACHINE, 10**12).plan.kernel == "dequantize"
        for other in both.kernels:
            asked = plan(SHAPE, batch_shape, both, 10**12, {"kernel": other})
            assert asked.plan.kernel == other and asked.seconds >= found.seconds
    assert plan(replace(SHAPE, packed=False), LOAD, both, 10**12).plan.kernel == "auto"


def test_the_least_memory_on_a_gpu_is_that_of_the_fused_kernel():
    """There every matrix of a block may be unpacked at once, because MLX frees them late."""
    both = replace(MACHINE, kernels=("fused", "dequantize"))
    known = Measurements(overlaps=True)
    least = smallest(SHAPE, LOAD, both, measurements=known)
    assert least.plan.kernel == "fused"
    unpacked = expected(SHAPE, LOAD, both, replace(least.plan, kernel="dequantize"), known)
    assert unpacked.peak - least.peak == 2 * SHAPE.block_weights * SHAPE.itemsize
    on_cpu = [
        expected(SHAPE, LOAD, both, replace(least.plan, kernel=kernel)) for kernel in both.kernels
    ]
    assert on_cpu[0].peak == on_cpu[1].peak


def test_slices_of_an_mlp_are_unpacked_whatever_the_kernel():
    batch_shape = BatchShape(1, 512, 512)
    slow = replace(MACHINE, kernels=("fused",), rates=replace(RATES, fused_flops=1e9))
    sliced, layers = (
        seconds(SHAPE, batch_shape, Plan(mlp_bytes=size, kernel="fused"), slow)
        for size in (MIB, None)
    )
    share = SHAPE.mlp_weights / SHAPE.block_weights
    assert sliced / layers == pytest.approx(1 - share, rel=0.05)


def test_a_measured_peak_corrects_the_expected_one():
    first = plan(SHAPE, LOAD, MACHINE, 2 * GB)
    second = plan(SHAPE, LOAD, MACHINE, 2 * GB, measurements=Measurements(correction=1.5))
    assert Memory(SHAPE, LOAD, second.plan).peak()[0] < first.peak / 1.3
    assert second.seconds >= first.seconds


def said(needed):
    return size(-(-needed // 10**6) * 10**6, up=True)


def test_a_budget_that_is_too_small_names_what_would_help():
    fixed = {"micro_batches": 1}  # else a smaller batch would help nothing
    with pytest.raises(EdgeLoraError) as caught:
        plan(SHAPE, LOAD, MACHINE, 20 * 10**6, fixed)
    text = str(caught.value)
    least = smallest(SHAPE, LOAD, MACHINE, fixed).needs
    assert text.startswith(f"memory_budget: got 20.0 MB, expected at least {said(least)} for")
    for option in ("max_seq_length 1024 needs", "rank 8 needs", "batch_size 2 needs"):
        assert option in text
    assert "\n" not in text


def test_less_than_a_megabyte_helps_nothing():
    # Of keys and values of all tokens little is held, either.
    sizes = {"adapter_bytes": 4000, "mlp_adapter_bytes": 2000, "keys": 4}
    shape = replace(SHAPE, **sizes, block_bytes=SHAPE.block_bytes - 400_000)
    with pytest.raises(EdgeLoraError) as caught:
        plan(shape, LOAD, MACHINE, 20 * 10**6)
    text = str(caught.value)
    fewer = replace(shape, rank=8, adapter_bytes=2000, mlp_adapter_bytes=1000)
    least, halved = (smallest(s, LOAD, MACHINE).needs for s in (shape, fewer))
    assert halved < least < halved + 10**6 / 2
    assert text.endswith("(rank 8 and batch_size 2 would not help)")
    # Rows are halved further until it can be seen.
    tokens, needed = re.search(r"max_seq_length (\d+) needs ([\d.]+ [MG]B)", text).groups()
    longer = BatchShape(LOAD.rows, 2 * int(tokens), LOAD.labelled * 2 * int(tokens) // LOAD.tokens)
    needs = smallest(shape, longer, MACHINE).needs
    assert needs < least and said(needs) == said(least) != needed


def test_what_helps_where_tokens_and_rows_are_computed_a_few_at_a_time():
    for itemsize in (2, 4):
        shape = replace(SHAPE, itemsize=itemsize)
        with pytest.raises(EdgeLoraError) as caught:
            plan(shape, LOAD, MACHINE, 20 * 10**6)
        text = str(caught.value)
        assert ("dtype bfloat16 needs" in text) == (itemsize == 4)
        assert "rank 8 needs" in text
        assert text.endswith("(batch_size 2 would not help)")
        # The longest of the halves that takes less.
        tokens = int(re.search(r"max_seq_length (\d+) needs", text)[1])
        least = smallest(shape, LOAD, MACHINE).needs
        for length, less in ((tokens, True), (2 * tokens, False)):
            batch_shape = BatchShape(LOAD.rows, length, LOAD.labelled * length // LOAD.tokens)
            assert (smallest(shape, batch_shape, MACHINE).needs < least) == less


@given(st.integers(0, 200), st.integers(1, 9), st.integers(0, 150))
def test_the_most_that_works(bound, step, limit):
    found = largest_that(lambda value: value <= bound, step, limit)
    assert found == min(bound // step, limit // step) * step
