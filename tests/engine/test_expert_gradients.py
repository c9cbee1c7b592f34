"""Blocks whose experts are computed by groups: the gradients of plain MLX, read as needed."""

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

from mlx_edgelora.blocks.experts import group_experts, set_groups
from mlx_edgelora.blocks.visits import visited_adapters
from mlx_edgelora.engine.visited_gradients import vjp_with_visits
from mlx_edgelora.model.weights import StreamedWeights

SMALL = 3000  # bytes; one or two experts of these models
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3")  # the last one with shared experts


@pytest.mark.parametrize("name", [*MIXTURES, pytest.param("qwen3_next", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tile_tokens", [None, 10])
def test_gradients_are_those_of_plain_mlx(name, tile_tokens, tmp_path):
    folder, batch = save(tmp_path, name, True), random_batch(2, 23)
    reference = plain(folder)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=tile_tokens, mlp_bytes=SMALL)) as ours:
        assert visited_adapters(ours.walk.blocks.blocks[-1])
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
    assert len(seen) == 6  # once forward, twice backward
    assert not any("switch_mlp" in name for arrays in blocks for name in arrays)


def test_a_plan_without_groups_reads_blocks_whole_again(tmp_path, monkeypatch):
    folder, batch = save(tmp_path, "qwen3_moe", True), random_batch(1, 9)
    with closing(engine(folder, mlp_bytes=SMALL)) as ours:
        _, expected = ours.value_and_grad(batch)
        ours.set_plan(ours.plan.__class__(mlp_bytes=None))
        monkeypatch.setattr(StreamedWeights, "start_rows", None)  # must not be called
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected)


def test_a_block_that_calls_its_experts_twice_is_an_error():
    block = nn.Module()
    block.experts = layer = SwitchGLU(8, 8, 3).freeze()
    blocks = SimpleNamespace(blocks=[block])
    group_experts(blocks, None)
    set_groups(blocks, 1, 1)
    x, indices = mx.ones((4, 8)), mx.zeros((4, 1), mx.int32)

    def twice(x):
        return [layer(layer(x, indices)[:, 0], indices)]

    with pytest.raises(RuntimeError, match="visits its experts or MLPs more than once"):
        vjp_with_visits(twice, [x], [mx.ones((4, 1, 8))], {})
