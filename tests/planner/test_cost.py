"""What a step is expected to take, as arithmetic; against real steps in training/test_sampling."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import LOAD, LOADS, SHAPE, SHAPES

from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.measured import KNOWN, Measurement, Measurements
from mlx_edgelora.planner.needs import TERMS, sizes_of
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.sizes import BatchShape

WAYS = st.fixed_dictionaries({"kept_blocks": st.integers(0, 80)}) | st.fixed_dictionaries(
    {"tile_tokens": st.sampled_from([256, 512, 2048])}
)
HELD = {
    "streamed_blocks": st.none() | st.integers(0, 80),
    "inputs": st.sampled_from(["file", "memory"]),
    "head": st.sampled_from(["resident", "streamed"]),
    "adapters": st.sampled_from(["resident", "paged"]),
    "prefetch": st.booleans(),
    "mlp_bytes": st.sampled_from([None, 4 * MIB, 16 * MIB]),
    "micro_batches": st.integers(1, 4),
}


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(shape=SHAPES, batch_shape=LOADS, way=WAYS, held=st.fixed_dictionaries(HELD))
def test_the_ends_are_all_that_decides(shape, batch_shape, way, held):
    """The peak over the blocks that are looked at is that over all blocks."""
    memory = Memory(shape, batch_shape, Plan(**way, **held))
    phases = list(memory.phases())
    assert memory.peak() == (max(p.bytes for p in phases), max(p.upper_bytes for p in phases))


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(kept_blocks=3), Plan(kept_blocks=28, streamed_blocks=0), Plan(tile_tokens=512)],
    ids=["whole", "kept", "all kept", "tiles"],
)
@pytest.mark.parametrize("mlp_bytes", [None, 16 * MIB])
def test_every_phase_has_a_formula_and_a_measure(plan, mlp_bytes):
    plan = Plan(**{**plan.__dict__, "mlp_bytes": mlp_bytes})
    memory = Memory(SHAPE, LOAD, plan)
    kinds = [memory.kind(name) for name in memory.ways]
    assert set(kinds) <= set(TERMS)
    before = memory.peak()
    measurements = Measurements()
    for name in memory.ways:
        kind = memory.kind(name)
        sizes = sizes_of(kind, SHAPE, memory.ways[name], LOAD)
        assert set(TERMS[kind]) & set(sizes)
        measurements.add(kind, memory.ways[name], memory.batch_shape, Measurement(10**9, 1.0))
    phases = list(Memory(SHAPE, LOAD, plan, measurements).phases())
    assert {phase.need.value for phase in phases} == {10**9}
    assert {phase.need.spread for phase in phases} == {KNOWN}
    assert Memory(SHAPE, LOAD, plan, measurements).peak() != before


def test_weights_that_are_read_again_and_again_are_there_in_every_phase():
    """Two blocks' of which one is read ahead, three where the one before is still computed."""
    held = {}
    for overlaps in (False, True):
        for prefetch in (False, True):
            measurements = Measurements(overlaps=overlaps)
            phases = Memory(SHAPE, LOAD, Plan(prefetch=prefetch), measurements).phases()
            held[overlaps, prefetch] = {(p.name, p.block): p.held for p in phases}
    for number, way in ((1, (False, True)), (2, (True, True)), (0, (True, False))):
        more = {key: held[way][key] - size for key, size in held[False, False].items()}
        assert set(more.values()) == {number * SHAPE.block_bytes}
    one = Memory(SHAPE, LOAD, Plan(streamed_blocks=1))
    none = Memory(SHAPE, LOAD, Plan(streamed_blocks=0))
    assert none.base - one.base == SHAPE.head_bytes  # one block is in memory either way


def test_a_head_on_disk_is_never_read_whole():
    for kept in (0, 2):
        on_disk, in_memory = (
            Memory(SHAPE, LOAD, Plan(kept_blocks=kept, head=head))
            for head in ("streamed", "resident")
        )
        assert in_memory.base - on_disk.base == SHAPE.head_bytes
        if kept:
            tails = [
                next(p.held for p in memory.phases() if p.block == 26)
                for memory in (on_disk, in_memory)
            ]
            assert tails[1] - tails[0] == SHAPE.head_bytes


@pytest.mark.parametrize(
    ("streamed", "kept", "head", "blocks"),
    [
        (27, 4, "streamed", 3),
        (25, 4, "streamed", 2),  # the one that is kept, and the one that was computed before it
        (2, 27, "streamed", 2),
        (2, 27, "resident", 1),  # read after the one before it was freed
        (28, 28, "streamed", 28),
        (4, 4, "streamed", 2),
    ],
)
def test_kept_blocks_take_the_memory_that_others_are_read_into(streamed, kept, head, blocks):
    def held(plan):
        phases = Memory(SHAPE, LOAD, plan).phases()
        return next(p.held for p in phases if (p.name, p.block) == ("backward", 28 - kept))

    plan = Plan(streamed_blocks=streamed, kept_blocks=kept, head=head)
    every = held(replace(plan, streamed_blocks=0, head="resident"))
    less = (streamed - blocks) * SHAPE.block_bytes + SHAPE.head_bytes * (head == "streamed")
    assert held(plan) == every - less


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("adapters", ["resident", "paged"])
def test_sums_of_gradients_are_there_from_the_start(kept, adapters):
    """With several batches before an update, and in all parts of a batch but the first."""
    shape = replace(SHAPE, outside_adapter_bytes=10**6)
    plan = Plan(kept_blocks=kept, adapters=adapters, streamed_blocks=0)

    def held(shape, plan):
        return {(p.name, p.block): p.held for p in Memory(shape, LOAD, plan).phases()}

    few, all_of_them = held(shape, plan), held(replace(shape, accumulates=True), plan)
    blocks = shape.blocks * shape.adapter_bytes * (adapters == "resident")
    for place, size in few.items():
        name, block = place
        if name == "forward" or (name, block) in (("head", None), ("backward", 28 - kept)):
            assert all_of_them[place] - size == blocks + 10**6, place
        elif name == "backward":
            above = (27 - block) * shape.adapter_bytes * (adapters == "resident")
            assert all_of_them[place] - size == max(0, blocks + 10**6 - above), place
        elif name == "update":
            assert all_of_them[place] == size
    assert held(shape, replace(plan, micro_batches=2)) == held(
        replace(shape, accumulates=True), replace(plan, micro_batches=2)
    )


@pytest.mark.parametrize(
    ("adapter_bytes", "on_cpu", "on_gpu"), [(10**5, 28, 28), (10**6, 1, 28), (40 * MIB, 1, 1)]
)
def test_blocks_are_updated_one_after_the_other(adapter_bytes, on_cpu, on_gpu):
    """But small ones at once, and on a GPU larger ones too."""
    shape = replace(SHAPE, adapter_bytes=adapter_bytes)
    for overlaps, together in ((False, on_cpu), (True, on_gpu)):
        memory = Memory(shape, LOAD, Plan(), Measurements(overlaps=overlaps))
        needed = next(p.need.value for p in memory.phases() if p.name == "update")
        assert needed == 3 * together * adapter_bytes + MIB


@pytest.mark.parametrize(
    ("itemsize", "packed", "stored"),
    [(4, True, 0.6), (2, True, 0.6), (4, False, 2), (2, False, 0.6)],
)
def test_embeddings_are_there_with_the_rows_that_they_are_made_of(itemsize, packed, stored):
    """As one array for all tokens, so that in long rows they are the most."""

    def taken(tokens):
        shape = replace(SHAPE, itemsize=itemsize, head_packed=packed)
        phases = Memory(shape, BatchShape(1, tokens, 100), Plan(tile_tokens=256)).phases()
        return next(phase for phase in phases if phase.name == "load").bytes

    more = 4096 * SHAPE.hidden * (itemsize + stored)
    assert taken(8192) - taken(4096) == pytest.approx(more, abs=1)


def test_the_last_block_by_tiles_gets_gradients_of_labelled_tokens_alone():
    """The other tiles of its gradient are never made, so the block below it holds more."""
    plan = Plan(tile_tokens=512, inputs="memory")
    memories = [
        Memory(SHAPE, replace(LOAD, labelled=count), plan) for count in (LOAD.size // 4, LOAD.size)
    ]
    few, every = (
        {p.block: p.held for p in memory.phases() if p.name == "backward"} for memory in memories
    )
    last = SHAPE.blocks - 1
    assert every[last] - few[last] == 0.75 * memories[0].hidden
    assert {block: few[block] for block in range(last)} == {b: every[b] for b in range(last)}
