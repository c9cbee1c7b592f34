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
# Which of an architecture's blocks hand on states; the last one is computed for labelled rows.
RECURRENT = {
    "qwen3_5": [0],
    "qwen3_next": [0],
    "kimi_linear": [0],
    "olmo_hybrid": [0],
    "lfm2": [0],
    "mamba2": [0],
    "granitemoehybrid": [0],
    "nemotron_h": [1],
    "falcon_h1": [],  # attention in the same block, with a cache of its own
}


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
    monkeypatch.setitem(architectures.CONFIGS, name, SWEEP[name])
    folder, batch = save(tmp_path, name, False), random_batch(2, tokens)
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
