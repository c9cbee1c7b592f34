"""Recurrent and convolutional blocks by tiles: gradients through the states between tiles."""

import json
from contextlib import closing
from pathlib import Path

import architectures
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


@pytest.mark.parametrize("tokens", [23, 8])
@pytest.mark.parametrize("name", RECURRENT)
def test_gradients_equal_plain_mlx(name, tokens, tmp_path, monkeypatch):
    architecture = name.partition(":")[0]
    monkeypatch.setitem(architectures.CONFIGS, architecture, SWEEP[name])
    head = {"tie_word_embeddings": architecture in TIED}
    # mlx-lm changes the head of some checkpoints, unless it is quantized.
    folder = save(tmp_path, architecture, architecture == "baichuan_m1", **head)
    batch = random_batch(2, tokens)
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
