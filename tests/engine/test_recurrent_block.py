"""Recurrent and convolutional blocks by tiles: gradients through the states between tiles."""

import gc
import json
from contextlib import closing
from pathlib import Path

import architectures
import mlx.core as mx
import mlx.optimizers as optimizers
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

from mlx_edgelora.blocks.states import States
from mlx_edgelora.engine.hidden import Slots
from mlx_edgelora.engine.spilled import SpilledArrays, slots_of
from mlx_edgelora.storage.stores import RamStore

SWEEP = json.loads((Path(__file__).parents[1] / "sweep" / "configs.json").read_text())
# Which of an architecture's blocks hand on states, or have none and see no other token.
RECURRENT = {
    "qwen3_5": [0, 2],
    "qwen3_next": [0, 2],
    "kimi_linear": [0, 2],
    "olmo_hybrid": [0, 2],
    "lfm2": [0, 2],
    "mamba": [0, 1],
    "mamba2": [0, 1],
    "granitemoehybrid": [0, 2],
    "nemotron_h:moe": [0, 1, 3, 4],
    "falcon_h1": [0, 1],  # attention in the same block, with a cache of its own
    "baichuan_m1": [0, 1, 2],  # keys and values are convolved; a window in two blocks
    "rwkv7": [0, 1, 2],  # each block reads what the first one returns
    "bailing_moe_linear": [0],  # rotary positions, and a last block with attention
}
# mlx-lm's module has no head of its own.
TIED = ("lfm2",)
# Of states alone, with keys and values, without states, with what an earlier block returns: one.
EACH = ("qwen3_5", "mamba", "nemotron_h:moe", "falcon_h1")
CASES = [
    pytest.param(name, tokens, marks=() if name in EACH and tokens == 23 else pytest.mark.slow)
    for name in RECURRENT
    for tokens in (23, 8)
]


def saved(name, folder, monkeypatch):
    """A checkpoint of a configuration of the sweep."""
    architecture = name.partition(":")[0]
    monkeypatch.setitem(architectures.CONFIGS, architecture, SWEEP[name])
    head = {"tie_word_embeddings": architecture in TIED}
    # mlx-lm changes the head of some checkpoints, unless it is quantized.
    return save(folder, architecture, architecture == "baichuan_m1", **head)


def segments(ours, batch):
    """The names of the segments of a pass, and the results of one."""
    begun, found = ours.walk._new_pass, []

    def watched(*args):
        state = begun(*args)
        found.append([type(part).__name__ for part in state.segments])
        return state

    ours.walk._new_pass = watched
    (loss, _), got = ours.value_and_grad(batch)
    return found[0], loss, got


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_gradients_equal_plain_mlx(name, tokens, tmp_path, monkeypatch):
    folder, batch = saved(name, tmp_path, monkeypatch), random_batch(2, tokens)
    reference = plain(folder)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=10)) as ours:
        kinds, loss, got = segments(ours, batch)
        alone, _ = ours.loss(batch)
    found = [index for index, kind in enumerate(kinds) if kind == "RecurrentBlock"]
    assert (name, found) == (name, RECURRENT[name])
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert alone.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


def test_dropout_draws_the_masks_of_mlx(tmp_path, monkeypatch):
    """Such blocks are computed whole, because a tile would draw another mask."""
    folder, batch = saved("mamba2", tmp_path, monkeypatch), random_batch(2, 23)
    reference = plain(folder, dropout=0.4)
    mx.random.seed(3)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=10, dropout=0.4)) as ours:
        ours.walk.tile_choice(0, 46)  # its trials draw nothing from the generator
        mx.random.seed(3)
        kinds, loss, got = segments(ours, batch)
    assert set(kinds) == {"WholeBlock"}
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)


def test_no_state_waits_for_the_collector_of_cycles(tmp_path, monkeypatch):
    folder, batch = saved("falcon_h1", tmp_path, monkeypatch), random_batch(1, 23)
    with closing(engine(folder, tile_tokens=8)) as ours:
        ours.value_and_grad(batch)
        gc.collect()
        gc.disable()
        try:
            ours.value_and_grad(batch)
            assert not [one for one in gc.get_objects() if isinstance(one, States)]
        finally:
            gc.enable()


def test_arrays_larger_than_a_slot():
    slots = Slots(RamStore(), 4, 64)
    arrays = [mx.random.normal((2, 37)), mx.arange(5), mx.ones((3, 1), mx.bfloat16)]
    spilled = SpilledArrays(slots, arrays)
    assert all(map(mx.array_equal, spilled.arrays(), arrays))
    assert slots_of(sum(array.nbytes for array in arrays), 3, 64) >= 7  # pieces in use
    assert len(slots.store._arrays) == 7
    spilled.forget()
    assert not slots.store._arrays


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon_h1", "mamba"])
def test_twenty_steps_are_those_of_mlx_lm(name, tmp_path, monkeypatch):
    folder = saved(name, tmp_path, monkeypatch)
    batches = [random_batch(2, 23, seed=step % 2) for step in range(20)]
    # With 1e-2 plain MLX itself goes elsewhere after noise of 1e-6.
    reference, optimizer, expected = plain(folder), optimizers.AdamW(1e-3), []
    for batch in batches:
        loss, gradients = plain_value_and_grad(reference, batch)
        optimizer.update(reference, gradients)
        expected.append(loss)
    with closing(engine(folder, tile_tokens=10)) as ours:
        own, got = optimizers.AdamW(1e-3), []
        ours.adapters.start(own)
        for batch in batches:
            loss, _ = ours.backward(batch, ours.adapters.add)
            ours.adapters.update(own, 1)
            got.append(loss.item())
    assert expected[-1] < expected[0] - 1
    assert got == pytest.approx(expected, rel=1e-5)
