"""An engine that gets another plan follows it, whatever plan it was built for."""

from contextlib import closing
from dataclasses import replace

import mlx.core as mx
import pytest
from harness import assert_same_gradients, engine, random_batch, save

BATCH = random_batch(2, 23)


@pytest.mark.parametrize("tile_tokens", [None, 10])
def test_inputs_are_where_the_last_plan_says(tmp_path, tile_tokens):
    folder = save(tmp_path, "llama", True)
    with closing(engine(folder, spilled=False, tile_tokens=tile_tokens)) as ours:
        loss, expected = ours.value_and_grad(BATCH)
        assert ours.disk.written_bytes == 0
        ours.set_plan(replace(ours.plan, inputs="file"))
        again, found = ours.value_and_grad(BATCH)
        written = ours.disk.written_bytes
        hidden = BATCH.inputs().size * ours.model.args.hidden_size * 4
        assert written >= 2 * hidden  # of the first two blocks of three at least
        ours.set_plan(replace(ours.plan, inputs="memory"))
        ours.value_and_grad(BATCH)
        assert ours.disk.written_bytes == written
    assert mx.array_equal(loss[0], again[0])
    assert_same_gradients(found, expected, 0)


def test_a_plan_with_inputs_in_memory_needs_no_folder(tmp_path):
    folder = save(tmp_path, "llama", True)
    with closing(engine(folder, spilled=False)) as ours:
        ours.value_and_grad(BATCH)
        assert "_file" not in vars(ours.walk.store)


def test_experts_are_apart_from_their_blocks_once_a_plan_has_groups(tmp_path):
    with closing(engine(save(tmp_path, "qwen3_moe", True), mlp_bytes=None)) as ours:
        functions = ours.walk._functions

        def apart():
            ours.value_and_grad(BATCH)
            return sum(map(functions._is_apart, range(3)))

        assert apart() == 0
        ours.set_plan(replace(ours.plan, mlp_bytes=8192))
        assert apart() > 0
        ours.set_plan(replace(ours.plan, mlp_bytes=None))
        assert apart() == 0
