"""Blocks whose experts are computed by groups: the gradients of plain MLX, read as needed."""

from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
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
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_edgelora.blocks.experts import expert_adapters, group_experts, set_groups
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.engine import expert_gradients
from mlx_edgelora.engine.expert_gradients import vjp_by_experts
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.storage.stores import MappedStore

SMALL = 3000  # bytes; one or two experts of these models
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3")  # the last one with shared experts


@pytest.mark.parametrize("name", [*MIXTURES, pytest.param("qwen3_next", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tile_tokens", [None, 10])
def test_gradients_are_those_of_plain_mlx(name, tile_tokens, tmp_path):
    folder, batch = save(tmp_path, name, True), random_batch(2, 23)
    reference = plain(folder)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=tile_tokens, mlp_bytes=SMALL)) as ours:
        assert expert_adapters(ours.walk.blocks.blocks[-1])
        (loss, _), got = ours.value_and_grad(batch)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        assert ours.loss(batch)[0].item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


@pytest.mark.parametrize(
    "options",
    [
        {"streamed": False},
        {"streamed_blocks": 1},
        {"kept_blocks": 1},
        {"streamed_blocks": 2, "kept_blocks": 2},
        {"num_layers": 1},
        {"keys": ["self_attn.q_proj"]},
        {"keys": ["mlp.switch_mlp.down_proj"]},
        {"adapters": "paged", "tile_tokens": 10},
    ],
    ids=str,
)
def test_wherever_weights_and_adapters_are(options, tmp_path):
    folder, batch = save(tmp_path, "qwen3_moe", True), random_batch(2, 17)
    lora = {name: options[name] for name in ("num_layers", "keys") if name in options}
    reference = plain(folder, **lora)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, mlp_bytes=SMALL, **options)) as ours:
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


def test_only_experts_that_are_picked_are_read(tmp_path, monkeypatch):
    folder, batch = save(tmp_path, "qwen3_moe", True), random_batch(1, 1, share=2.0)
    seen, blocks = [], []
    rows, block = StreamedWeights.start_rows, StreamedWeights.block

    def spied_rows(self, index, names, wanted):
        seen.append((index, tuple(wanted)))
        return rows(self, index, names, wanted)

    def spied_block(self, *args, **kwargs):
        blocks.append(block(self, *args, **kwargs))
        return blocks[-1]

    with closing(engine(folder, mlp_bytes=10**9)) as ours:
        monkeypatch.setattr(StreamedWeights, "start_rows", spied_rows)
        monkeypatch.setattr(StreamedWeights, "block", spied_block)
        ours.value_and_grad(batch)
    # One token picks two of the four experts in blocks 0 and 2; block 1 has none.
    assert {index for index, _ in seen} == {0, 2}
    assert all(len(wanted) == 2 for _, wanted in seen)
    assert len(seen) == 4  # once forward, once backward
    assert not any("switch_mlp" in name for arrays in blocks for name in arrays)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_trial_of_tiles_reads_a_block_once_and_no_experts(name, tmp_path):
    """Blocks 0 and 1 differ in each of these."""
    folder = save(tmp_path, name, True)
    with closing(engine(folder, tile_tokens=10, mlp_bytes=SMALL, adapters="paged")) as ours:
        walk = ours.walk
        for index in range(2):
            tiling = Tiling(walk.blocks, (walk.weights, walk.adapters))
            walk.weights.trim()
            before = ours.disk.snapshot().read_bytes
            assert tiling.tileable(index).possible
            read = ours.disk.snapshot().read_bytes - before
            sources = walk.weights.block(index), walk.adapters.block(index)
            once = sum(array.nbytes for held in sources for array in held.values())
            assert once <= read < 1.1 * once  # some rows of the embedding as well


def test_a_plan_without_groups_reads_blocks_whole_again(tmp_path, monkeypatch):
    folder, batch = save(tmp_path, "qwen3_moe", True), random_batch(1, 9)
    with closing(engine(folder, mlp_bytes=SMALL)) as ours:
        _, expected = ours.value_and_grad(batch)
        ours.set_plan(ours.plan.__class__(mlp_bytes=None))
        monkeypatch.setattr(StreamedWeights, "start_rows", None)  # must not be called
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected)


def grouped(layer):
    """A layer of experts that is computed expert by expert."""
    block = nn.Module()
    block.experts = layer
    blocks = SimpleNamespace(blocks=[block])
    group_experts(blocks, None)
    set_groups(blocks, 1, 1)
    return layer


def test_a_block_that_calls_its_experts_twice_is_an_error():
    layer = grouped(SwitchGLU(8, 8, 3).freeze())
    x, indices = mx.ones((4, 8)), mx.zeros((4, 1), mx.int32)

    def twice(x):
        return [layer(layer(x, indices)[:, 0], indices)]

    with pytest.raises(RuntimeError, match="calls its experts more than once"):
        vjp_by_experts(twice, [x], [mx.ones((4, 1, 8))], {})


def test_each_expert_is_read_once_a_visit_for_all_tiles(tmp_path, monkeypatch):
    folder, batch = save(tmp_path, "deepseek_v3", True), random_batch(2, 23)
    seen, rows = [], StreamedWeights.start_rows

    def spied_rows(self, index, names, wanted):
        seen.extend((index, expert) for expert in wanted)
        return rows(self, index, names, wanted)

    with closing(engine(folder, tile_tokens=10, mlp_bytes=SMALL)) as ours:
        ours.value_and_grad(batch)  # trials, which read as they please
        monkeypatch.setattr(StreamedWeights, "start_rows", spied_rows)
        ours.value_and_grad(batch)
    counts = Counter(seen)
    assert len(counts) > 3
    assert set(counts.values()) == {2}  # once forward, once backward


@pytest.mark.parametrize("tile_tokens", [None, 10])
def test_blocks_that_are_not_affine_in_their_experts(tile_tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(expert_gradients, "_is_affine", lambda *_: False)
    folder, batch = save(tmp_path, "gpt_oss", True), random_batch(2, 23)
    reference = plain(folder)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=tile_tokens, mlp_bytes=SMALL)) as ours:
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


ENDS = {
    "sum": (lambda y: y.sum(axis=-2), True),
    "weighted": (lambda y: 3 * y.mean(axis=-2) + 1, True),
    "norm": (lambda y: mx.fast.rms_norm(y.sum(axis=-2), None, 1e-6), False),
    "tanh": (lambda y: mx.tanh(y.sum(axis=-2)), False),
    "clip": (lambda y: mx.clip(y, -20, 20).sum(axis=-2), False),
    "relu": (lambda y: nn.relu(y).sum(axis=-2), False),
}


@pytest.mark.parametrize("end", ENDS)
def test_whether_a_block_is_affine_in_its_experts_is_found_out(end):
    layer = grouped(SwitchGLU(8, 8, 3).freeze())
    after, is_affine = ENDS[end]
    x, indices = mx.random.normal((9, 8), key=mx.random.key(1)), mx.arange(9)[:, None] % 3

    def block(x):
        return [x + after(layer(mx.sin(x), indices))]

    cotangents, found = [mx.random.normal((9, 8), key=mx.random.key(2))], {}
    expected = mx.vjp(block, [x], cotangents)[1][0]
    got = vjp_by_experts(block, [x], cotangents, {}, found, "kind")[1][0]
    assert found == {"kind": is_affine}
    assert mx.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_the_file_is_large_enough_for_experts_before_the_first_step(name, tmp_path, monkeypatch):
    folder, batch = save(tmp_path, name, True), random_batch(2, 23)
    with closing(engine(folder, tile_tokens=10, mlp_bytes=SMALL)) as ours:
        _ = ours.walk.tiling  # the trials show how many experts a token picks
        ours.walk.reserve(2, 23, 4 * ours.walk.blocks.model.args.hidden_size)
        monkeypatch.setattr(MappedStore, "_move", None)  # must not be called
        ours.value_and_grad(batch)
