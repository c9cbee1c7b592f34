"""Blocks that take their hidden state in another form: the gradients of plain MLX."""

import json
from contextlib import closing
from pathlib import Path

import architectures
import mlx.core as mx
import mlx.nn as nn
import pytest
import toy
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.settling import settles

SWEEP = json.loads((Path(__file__).parents[1] / "sweep" / "configs.json").read_text())
# Embeddings before the hidden state; four hidden states of a token, and clipped weights.
FORMS = {
    "talkie": None,
    # mlx-lm reads `.weight` of other layers, which its LoRA layers do not have.
    "gemma3n": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
}


@pytest.mark.parametrize(
    "name", [n if n == "talkie" else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]
)
def test_gradients_by_tiles_equal_plain_mlx(name, tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.CONFIGS, name, SWEEP[name])
    folder, batch, keys = save(tmp_path, name, False), random_batch(2, 23), FORMS[name]
    reference = plain(folder, keys=keys)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, keys=keys, tile_tokens=10)) as ours:
        count = len(ours.walk.blocks)
        assert ours.walk.tiling == f"10 tokens at a time in {count} of {count} blocks"
        (loss, _), got = ours.value_and_grad(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


class Second(toy.Block):
    def __call__(self, first, x, mask=None, **others):
        return super().__call__(x) + first


class Stacked(toy.Block):
    """Two hidden states of a token, [2, B, T, D]."""


def second(self, h):
    first = h
    for layer in self.layers:
        h = layer(first, h, mask=None)
    return h


def stacked(self, h):
    h = mx.stack([h, 2 * h])
    for layer in self.layers:
        h = layer(x=h)
    return h.sum(axis=0)


def test_the_form_is_found_and_undone():
    model = type("Toy", (toy.Toy,), {"loop": second})(Second)
    with pytest.raises(EdgeLoraError, match="trained parameters outside the blocks reach it"):
        checked_blocks(model)
    model.embed.freeze()
    blocks = checked_blocks(model)
    assert (blocks.call_form.parameter, blocks.call_form.axes) == ("x", (0, 1))
    model = type("Toy", (toy.Toy,), {"loop": stacked})(Stacked)
    blocks = checked_blocks(model)
    assert (blocks.call_form.axes, blocks.call_form.others) == ((1, 2), (2, toy.WIDTH))
    tokens, seen = mx.array([[1, 2, 3]]), []

    def compute(index, x, args, kwargs):
        seen.append(x.shape)
        return blocks.function(index)(x, *args, **kwargs)

    expected = model(tokens)
    with blocks.intercept(compute):
        assert mx.array_equal(model(tokens), expected)
    assert seen == [(1, 3, 2 * toy.WIDTH)] * 4


def test_a_hidden_state_changed_between_blocks_is_refused():
    def changing(self, h):
        h = mx.stack([h, 2 * h])
        for layer in self.layers:
            h = layer(h)
            h[0] = h[0] + 1
        return h.sum(axis=0)

    model = type("Toy", (toy.Toy,), {"loop": changing})(Stacked)
    with pytest.raises(EdgeLoraError, match="its input is not what the block before returned"):
        checked_blocks(model)


class Clipping(toy.Block):
    """Replaces an array of itself, by a function that a test sets."""

    def __init__(self):
        super().__init__()
        self.limits = mx.ones(3)

    def __call__(self, x, mask=None, **others):
        self.limits = self.function(self.limits, x)
        return super().__call__(x) * self.limits[0]


@pytest.mark.parametrize(
    "function",
    [lambda w, x: w + 1, lambda w, x: w + x.sum(), lambda w, x: x.sum() + mx.zeros(3)],
    ids=["counts", "adds its input", "keeps its input"],
)
def test_a_block_with_a_memory_is_refused(function, monkeypatch):
    monkeypatch.setattr(Clipping, "function", staticmethod(lambda w, x: mx.clip(w, -1, 1)), False)
    assert checked_blocks(toy.Toy(Clipping).freeze())
    with pytest.raises(EdgeLoraError, match="it changes its own attributes"):
        checked_blocks(toy.Toy(Clipping))  # what is clipped is trained
    monkeypatch.setattr(Clipping, "function", staticmethod(function))
    with pytest.raises(EdgeLoraError, match="it changes its own attributes"):
        checked_blocks(toy.Toy(Clipping).freeze())


def test_nothing_settles_where_attributes_change():
    class Counting(Clipping):
        def __call__(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.limits = mx.clip(self.limits, -1, 1)
            return x

    block = Counting()
    nn.Module.freeze(block)
    assert not settles(block, block, mx.zeros((1, 2, toy.WIDTH)))
