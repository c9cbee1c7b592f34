"""Blocks with several caches by tiles: two latent attentions in a block, sparse attention."""

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
from mlx.utils import tree_flatten
from mlx_lm.models import base

from mlx_edgelora.blocks.cached_parts import CachedParts
from mlx_edgelora.blocks.cached_trial import append
from mlx_edgelora.blocks.parts import TokenSpan

SWEEP = json.loads((Path(__file__).parents[1] / "sweep" / "configs.json").read_text())
FAST = "longcat_flash"
# The tokens of a tile attend to 4 of at most 23 keys where attention is sparse.
NAMES = ("deepseek_v32", "deepseek_v32:sparse", "glm_moe_dsa", "minimax_m3_vl:sparse", FAST)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        (FAST, 0.05),  # tiles of which nothing is labelled
        *(pytest.param(name, 0.4, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_gradients_by_tiles_equal_plain_mlx(name, share, tmp_path, monkeypatch):
    own = name.partition(":")[0]
    monkeypatch.setitem(architectures.CONFIGS, own, SWEEP[name])
    folder, batch = save(tmp_path, own, True), random_batch(2, 23, share=share)
    reference = plain(folder)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    # Which keys are attended to has no gradient, so nor have the layers that decide it.
    expected = dict(tree_flatten(expected))
    zero = {name for name, value in expected.items() if not mx.any(value).item()}
    with closing(engine(folder, tile_tokens=10)) as ours:
        choices = [ours.walk.tile_choice(i, 46) for i in range(len(ours.walk.blocks))]
        assert all(choice.possible and choice.appended for choice in choices)
        (loss, _), got = ours.value_and_grad(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    got = dict(tree_flatten(got))
    assert not any(mx.any(got.pop(name)).item() for name in zero)
    expected = {name: value for name, value in expected.items() if name not in zero}
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


def attend(q, k, v, cache, mask):
    return base.scaled_dot_product_attention(q, k, v, cache=cache, scale=1.0, mask=mask)


def test_what_two_caches_are_given():
    """A block that attends twice, the second time to what it attended to."""

    def block(x, mask=None, cache=None):
        h = x[:, None]
        k, v = cache[0].update_and_fetch(h, 2 * h)
        h = h + attend(h, k, v, cache[0], mask)
        k, v = cache[1][0].update_and_fetch(h, 3 * h)
        return attend(h, k, v, cache[1][0], mask)[:, 0]

    class Plain:
        def __getitem__(self, index):
            return self

        def update_and_fetch(self, k, v):
            return k, v

    x = mx.random.normal((2, 7, 4), key=mx.random.key(0))
    expected = block(x, "causal", Plain())
    parts, held, tiles = CachedParts(block, ("causal", None), {}), [], []
    for span in (TokenSpan(0, 3), TokenSpan(3, 4), TokenSpan(4, 7)):
        mine = x[:, span.start : span.stop]
        tile, own = parts.tile(mine, span, held)
        for again, array in zip(parts.appended(mine, span, held, 4), own, strict=True):
            assert mx.array_equal(again, array)
        held = append(held, own)
        tiles.append(tile)
    assert mx.allclose(mx.concatenate(tiles, axis=1), expected, atol=1e-6)
    with pytest.raises(RuntimeError, match="filled twice"):
        twice = CachedParts(
            lambda x, mask, cache: block(block(x, mask, cache), mask, cache), ("causal", None), {}
        )
        twice.tile(mine, span, [])


@pytest.mark.slow
def test_twenty_steps_are_those_of_mlx_lm(tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.CONFIGS, FAST, SWEEP[FAST])
    folder = save(tmp_path, FAST, True)
    batches = [random_batch(2, 23, seed=seed) for seed in range(3)]
    reference, theirs = plain(folder), optimizers.AdamW(1e-3)
    expected = []
    for step in range(20):
        loss, gradients = plain_value_and_grad(reference, batches[step % 3])
        theirs.update(reference, gradients)
        mx.eval(reference.parameters(), theirs.state)
        expected.append(loss)
    found, own = [], optimizers.AdamW(1e-3)
    with closing(engine(folder, tile_tokens=10, adapters="paged")) as ours:
        ours.adapters.start(own)
        for step in range(20):
            loss, _ = ours.backward(batches[step % 3], ours.adapters.add)
            ours.adapters.update(own, 1)
            found.append(loss.item())
    assert expected[-1] < expected[1] - 0.01  # it is trained
    assert found == pytest.approx(expected, rel=1e-5)
