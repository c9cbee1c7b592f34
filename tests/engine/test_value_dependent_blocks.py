"""Blocks that decide by values what they compute, as mlx-lm's dbrx picks experts in training."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import add_lora, build
from harness import assert_same_gradients
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.base import create_attention_mask
from toy import Toy as ToyModel

from mlx_edgelora.blocks.tracing import depends_on_values
from mlx_edgelora.engine.functions import can_compile
from mlx_edgelora.engine.gradients import gradient_tree
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.planner.plan import Plan

WIDTH = 8


class Picking(nn.Module):
    """Attention, then one of two matrices for each half of a row: by the sign of a sum."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.experts = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]

    def __call__(self, x, mask=None, cache=None):
        q, k, v = mx.split(self.qkv(x)[:, None], 3, axis=-1)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.3, mask=mask)
        x = x + self.out(out[:, 0])
        picked = np.array(x[..., 0] > 0)
        y = mx.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, columns = map(mx.array, np.where(picked == bool(number)))
            if rows.size:
                y[rows, columns] = expert(x[rows, columns])
        return x + y


class Toy(ToyModel):
    def __init__(self):
        super().__init__(Picking)

    def loop(self, h):
        # The first entry of a token's state decides: the last tokens are the others.
        signs = mx.where(mx.arange(h.shape[1]) < h.shape[1] - 4, 6.0, -6.0)
        h[..., 0] = signs
        mask = create_attention_mask(h)
        for layer in self.layers:
            h = layer(h, mask)
        return h


@pytest.fixture(params=[False, True], ids=["built anew", "compiled"])
def compiled(request):
    if request.param:
        request.getfixturevalue("compiles")
    return request.param


class TailLoss:
    """Any loss that calls the model, for blocks that are kept."""

    def __init__(self, walk, state, loss):
        self.walk, self.state, self.loss = walk, state, loss
        self.key, self.arrays, self.outside = "a loss", [], walk.outside()

    def graph(self, hidden, outside):
        with self.walk.tail(self.state, hidden, outside):
            return self.loss()


def walked(model, loss, plan, compiled=False):
    """The value and all gradients of a walk."""
    walk = Walk(model, compiled=compiled, plan=plan)
    if plan.tile_tokens is not None:
        count = len(model.layers)
        assert walk.tiling == f"6 tokens at a time in {count} of {count} blocks"
    with walk.forward(loss) as state:

        def tail(hidden):
            with walk.tail(state, hidden):
                return loss()

        if state.tail is not None:
            value, outside = walk.finish(state, TailLoss(walk, state, loss))
            assert not outside
        else:
            value, state.cotangent = mx.value_and_grad(tail)(state.hidden)
        found = {name: value for more in walk.backward(state) for name, value in more.items()}
    return value, gradient_tree(model, found)


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(tile_tokens=6), Plan(kept_blocks=2)],
    ids=["whole", "tiles", "two kept"],
)
def test_what_the_first_tile_does_not_reach_still_gets_its_gradient(plan, compiled):
    """Backwards from the last tile, where the second matrix alone is picked, and then the first."""
    model, tokens = Toy(), mx.arange(1, 23).reshape(1, 22) % 11
    add_lora(model, keys=["qkv", "experts.0", "experts.1"])

    def loss():
        return mx.logsumexp(model(tokens), axis=-1).mean()

    value, expected = nn.value_and_grad(model, loss)()
    got_value, got = walked(model, loss, plan, compiled)
    assert got_value.item() == pytest.approx(value.item(), rel=1e-6)
    assert_same_gradients(got, expected)


class Flagged(nn.Module):
    """Attention, then one of two matrices: as an argument says, or an array of its own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.constants = (mx.random.normal((WIDTH,)),)
        self.gate = mx.array(0.0)

    def __call__(self, x, mask=None, cache=None, flag=False):
        q, k, v = mx.split(self.qkv(x)[:, None], 3, axis=-1)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.3, mask=mask)
        chosen = self.two if flag or self.gate.item() > 0 else self.one
        return x + out[:, 0] + mx.tanh(chosen(x)) * self.constants[0]


@pytest.mark.parametrize("by", ["argument", "array"])
@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(tile_tokens=6), Plan(kept_blocks=4)],
    ids=["whole", "tiles", "all kept"],
)
def test_blocks_of_one_kind_that_are_called_otherwise(plan, compiled, by):
    class Flags(ToyModel):
        def loop(self, h):
            mask = create_attention_mask(h)
            for index, layer in enumerate(self.layers):
                h = layer(h, mask, flag=by == "argument" and index % 2 == 1)
            return h

    model, tokens = Flags(Flagged), mx.arange(1, 23).reshape(1, 22) % 11
    add_lora(model, keys=["qkv", "one", "two"])
    if by == "array":
        for layer in model.layers[1::2]:
            layer.gate = mx.array(1.0)

    def loss():
        return mx.logsumexp(model(tokens), axis=-1).mean()

    value, expected = nn.value_and_grad(model, loss)()
    got_value, got = walked(model, loss, plan, compiled)
    assert got_value.item() == pytest.approx(value.item(), rel=1e-6)
    for (name, one), (_, other) in zip(tree_flatten(got), tree_flatten(expected), strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-6).item(), name


@pytest.mark.parametrize("plan", [Plan(), Plan(tile_tokens=6)], ids=["whole", "tiles"])
def test_sinks_that_are_trained(plan):
    """They go into attention beside queries, keys and values, which is cut off by tiles."""
    model = build("gpt_oss")
    add_lora(model)
    for layer in model.layers:
        layer.self_attn.unfreeze(keys=["sinks"], recurse=False)
    tokens = mx.arange(1, 23).reshape(1, 22)

    def loss():
        return mx.logsumexp(model(tokens), axis=-1).mean()

    _, expected = nn.value_and_grad(model, loss)()
    _, got = walked(model, loss, plan)
    assert_same_gradients(got, expected)


def test_it_is_known_of_a_function_whether_it_looks_at_values(compiles):
    x = [mx.array([1.0, -2.0])]
    for function in (
        lambda x: x if (x[0] > 0).item() else -x,
        lambda x: x if x[0] > 0 else -x,
        lambda x: x * float(np.array(x).sum()),
        lambda x: mx.array(x.tolist()) * x,
        lambda x: (mx.eval(x), x)[1],
        lambda x: (memoryview(x), x)[1],
    ):
        assert depends_on_values(function, x)
    constant = mx.array(3)
    assert not depends_on_values(lambda x: x * constant.item() if x.size else x, x)
    mx.disable_compile()  # it is compiled for that moment, and not afterwards
    assert not depends_on_values(lambda x: x, x)
    assert depends_on_values(lambda x: x * x[0].item(), x)
    assert not can_compile.__wrapped__()
