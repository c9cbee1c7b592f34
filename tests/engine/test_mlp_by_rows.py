"""Gated MLPs whose matrices are read by rows: the gradients of plain MLX, no matrix in a block."""

from contextlib import closing
from types import SimpleNamespace

import mlx.core as mx
import pytest
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from peaks import lowest, peak

from mlx_edgelora.blocks.visits import VISITS, visited_adapters
from mlx_edgelora.engine.recurrent_block import RecurrentBlock
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.planner.plan import Plan

SMALL = 6000  # bytes; a few rows of these models
ROWS = {"mlp_weights": "rows", "mlp_bytes": SMALL, "tile_tokens": 10}


@pytest.fixture
def llama(tmp_path):
    return save(tmp_path, "llama", True)


FAST = [
    {},
    {"streamed_blocks": 1, "adapters": "paged"},
    {"keys": ["mlp.down_proj", "mlp.up_proj"]},
]
SLOW = [
    {"streamed": False},
    {"num_layers": 1},
    {"keys": ["self_attn.q_proj"]},
    {"tile_tokens": 1000},  # a batch that is no longer than a tile
]


@pytest.mark.parametrize(
    "options",
    [*FAST, *(pytest.param(options, marks=pytest.mark.slow) for options in SLOW)],
    ids=str,
)
def test_gradients_are_those_of_plain_mlx(options, llama):
    batch = random_batch(2, 23)
    lora = {name: options[name] for name in ("num_layers", "keys") if name in options}
    reference = plain(llama, **lora)
    loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(llama, **ROWS | options)) as ours:
        (got, _), gradients = ours.value_and_grad(batch)
        assert got.item() == pytest.approx(loss, rel=1e-5)
        assert ours.loss(batch)[0].item() == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients, expected, resolution=resolution(reference, batch))


@pytest.mark.parametrize(
    ("name", "visited"),
    [
        ("phi3", 0),  # gate and up in one matrix
        pytest.param("qwen3_next", 0, marks=pytest.mark.slow),  # experts beside it
        pytest.param("olmo_hybrid", 6, marks=pytest.mark.slow),  # states from tile to tile
    ],
)
def test_other_blocks(name, visited, tmp_path, monkeypatch):
    """Where it is not possible, the plan is followed as if it did not ask for it."""
    read, start = [], StreamedWeights.start_rows
    monkeypatch.setattr(
        StreamedWeights, "start_rows", lambda *args: read.append(args[2:]) or start(*args)
    )
    folder, batch = save(tmp_path, name, True), random_batch(2, 23)
    reference = plain(folder)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, **ROWS)) as ours:
        names = visited_adapters(ours.walk.blocks.blocks[0])
        assert len([n for n in names if "switch" not in n]) == visited
        read.clear()
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))
    if visited:  # five tiles, once forward and twice backward; never for states alone
        down = [row for names, rows in read if "down_proj" in names[0] for row in rows]
        assert {down.count(row) for row in down} == {3 * 5 * 3}


def test_states_that_depend_on_an_mlp_are_computed_with_it():
    call = SimpleNamespace(out_shape=(1, 2), x=mx.zeros((1, 2)))

    def outputs():
        y = VISITS.handle(call)
        return [], [mx.ones((1, 2)) if y is None else y]

    block = SimpleNamespace(_outputs=outputs, _has_visits=True)
    assert mx.array_equal(RecurrentBlock._states_alone(block, ())[0], mx.ones((1, 2)))


def test_dropout_needs_whole_matrices(llama):
    with closing(engine(llama, dropout=0.1, **ROWS)) as ours:
        assert not visited_adapters(ours.walk.blocks.blocks[0])


def test_matrices_are_read_once_a_visit_and_not_with_the_block(llama, monkeypatch):
    rows, blocks, batch = [], [], random_batch(1, 20)
    start, block = StreamedWeights.start_rows, StreamedWeights.block

    def spied_rows(self, index, names, wanted):
        rows.extend((index, names[0], row) for row in wanted)
        return start(self, index, names, wanted)

    def spied_block(self, *args, **kwargs):
        blocks.append(block(self, *args, **kwargs))
        return blocks[-1]

    with closing(engine(llama, **ROWS)) as ours:
        monkeypatch.setattr(StreamedWeights, "start_rows", spied_rows)
        monkeypatch.setattr(StreamedWeights, "block", spied_block)
        ours.value_and_grad(batch)
        assert not any(".mlp." in f".{name}" and "_proj" in name for b in blocks for name in b)
        ours.set_plan(Plan(tile_tokens=10, mlp_bytes=SMALL))
        seen = len(rows)
        ours.value_and_grad(batch)
    assert len(rows) == seen  # another plan reads blocks whole again
    # Two tiles, each visited once forward and twice backward.
    assert {rows.count(one) for one in rows} == {6}
    assert len({name for _, name, _ in rows}) == 3


@pytest.mark.slow
def test_the_matrices_are_not_in_memory(tmp_path, memory):
    shape = {"hidden_size": 128, "intermediate_size": 16384, "num_hidden_layers": 1}
    folder = save(tmp_path, "llama", True, **shape)
    matrices = 3 * 128 * 16384 * 5 // 8  # 4 bits, and float32 scales and biases of 32 entries

    def taken(weights, below=0.0):
        options = ROWS | {"mlp_weights": weights, "mlp_bytes": 500_000, "tile_tokens": 16}
        with closing(engine(folder, prefetch=False, adapters="paged", **options)) as ours:
            batch = random_batch(1, 48)
            return lowest(lambda: peak(lambda: ours.backward(batch, lambda more: None)), below)

    bound = taken("block") - 0.8 * matrices
    assert taken("rows", bound) < bound


@pytest.mark.parametrize("missing", ["tile_tokens", "mlp_bytes"])
def test_rows_without_tiles_are_refused(missing):
    with pytest.raises(EdgeLoraError, match="without tile_tokens and mlp_bytes"):
        Plan(**ROWS | {missing: None})
