"""Hidden states that are used where they lie: none is overwritten while something needs it."""

from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from aliasing import Aliases
from harness import assert_same_gradients, engine, plain, plain_value_and_grad, random_batch, save
from pairwise import pairwise

from mlx_edgelora.engine.hidden import Hidden

PLANS = {
    "whole": {},
    "tiles": {"tile_tokens": 10},
    "kept": {"kept_blocks": 1},
    "tail": {"kept_blocks": 1, "head": "resident"},
}
# Blocks that are computed by tiles, and a model whose linear attention is computed whole.
NAMES = ["llama", "qwen3_next"]


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp(request.param), request.param, True)
    batches = [random_batch(2, tokens, share=0.4) for tokens in (17, 21)]
    reference = plain(folder)
    return folder, [(batch, plain_value_and_grad(reference, batch)) for batch in batches]


def passes(case, plan, ahead, wraps=True):
    """Gradients of some steps, compared with plain MLX's."""
    folder, batches = case
    with closing(engine(folder, **plan)) as ours:
        ours.walk.ahead = ahead
        for batch, (expected_loss, expected) in batches * 2:
            (loss, _), got = ours.value_and_grad(batch)
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected)
        assert ours.walk.store._wraps is wraps


@pytest.mark.parametrize(
    ("case", "plan", "ahead"), sorted(pairwise(NAMES, PLANS, [False, True])), indirect=["case"]
)
def test_gradients_equal_plain_mlx(case, plan, ahead, monkeypatch):
    aliases = Aliases(monkeypatch)
    passes(case, PLANS[plan], ahead)
    assert len(aliases.sizes) > 4


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_a_slot_that_is_written_too_early_is_seen(case, monkeypatch):
    """Or the tests above could not fail; where tiles are copied it does not matter."""

    def tile(hidden, number):
        slots, slot = hidden._slots, hidden._numbers[number]
        given = slots.store.take(slot, keep=True)
        hidden._numbers[number] = slots.put(mx.array(np.array(given)))
        zeros = mx.zeros_like(given)
        mx.eval(zeros)
        slots.store.put(slot, zeros)
        slots.store._wait_for_write()
        slots.release(slot)
        return given

    monkeypatch.setattr(Hidden, "tile", tile)
    passes(case, PLANS["tiles"], False, wraps=False)
    Aliases(monkeypatch)
    with pytest.raises(AssertionError):
        passes(case, PLANS["tiles"], False)
