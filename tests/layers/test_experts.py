"""Experts one after the other: values and gradients are those of mlx-lm's layers."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from backends import frees_at_once
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlx_edgelora.blocks.block_list import array_slots, bind_arrays
from mlx_edgelora.blocks.experts import find_experts, group_experts, set_groups
from mlx_edgelora.blocks.lora_layers import LoRASwitchLinear
from mlx_edgelora.layers import experts as layer
from mlx_edgelora.layers.experts import visit_backward

WIDTH, INNER, RANK = 64, 96, 3
PACKINGS = {
    "float": None,
    "affine": {"group_size": 32, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


class Blocks:
    """A list of one block that holds a module."""

    def __init__(self, module):
        block = nn.Module()
        block.experts = module
        self.blocks = [block]


def make(kind, count, packing=None, bias=False, lora=True):
    mx.random.seed(3)
    module = kind(WIDTH, INNER, count, bias=bias)
    for name in find_experts(module):
        if bias:
            module[name].bias = mx.random.normal(module[name].bias.shape)
        if packing is not None:
            module[name] = module[name].to_quantized(**packing)
        if lora:
            adapted = LoRASwitchLinear.from_base(module[name], r=RANK, scale=2.0)
            object.__setattr__(adapted, "__class__", LoRASwitchLinear)  # as `add_lora` does
            adapted.lora_b = 0.1 * mx.random.normal(adapted.lora_b.shape)
            module[name] = adapted
    return module.freeze().unfreeze(keys=["lora_a", "lora_b"])


def glu(width, inner, count, bias):
    return SwitchGLU(width, inner, count, bias=bias)


def clipped(width, inner, count, bias):
    return SwitchGLU(width, inner, count, activation=SwigluOAI(), bias=bias)


def mlp(width, inner, count, bias):
    return SwitchMLP(width, inner, count, bias=bias)


def picks(tokens, k, count, used=None):
    scores = mx.random.normal((2, tokens, count), key=mx.random.key(5))
    if used is not None:  # the others are picked by nobody
        scores = mx.where(mx.arange(count) < used, scores, -1e9)
    return mx.argsort(-scores, axis=-1)[..., :k], mx.softmax(scores, axis=-1)[..., :k]


def value_and_gradients(module, x, indices, scores, cotangent):
    """Of the sum over experts, in x, scores and all adapters."""
    slots = {n: s for n, s in array_slots(module).items() if "lora" in n}
    names = list(slots)
    values = [box[key] for box, key in slots.values()]

    def function(x, scores, *values):
        with bind_arrays(slots, dict(zip(names, values, strict=True))):
            y = module(x, indices)
        return [(y * scores[..., None]).sum(axis=-2)]

    (out,), found = mx.vjp(function, [x, scores, *values], [cotangent])
    return [out, *found], ["output", "x", "scores", *names]


def assert_close(got, expected, names, tolerance=2e-5):
    for name, one, other in zip(names, got, expected, strict=True):
        size = mx.abs(other).max().item()
        assert mx.abs(one - other).max().item() <= tolerance * size + 1e-7, name


@pytest.mark.parametrize(
    ("kind", "packing", "bias", "k", "count", "used", "group"),
    [
        (glu, "affine", False, 1, 5, None, 1),
        (glu, "affine", False, 8, 9, None, 2),
        (glu, "float", False, 3, 7, 4, 3),
        (clipped, "mxfp4", True, 4, 6, None, 4),
        (clipped, "affine", True, 2, 6, 3, 100),
        (mlp, "affine", True, 2, 4, None, 3),
        (mlp, "float", False, 5, 5, None, 2),
    ],
)
@pytest.mark.parametrize("tokens", [1, 23])
def test_all_gradients_are_those_of_mlx(
    kind, packing, bias, k, count, used, group, tokens, monkeypatch
):
    monkeypatch.setattr(layer, "TOKENS", 5)  # an expert's rows in parts, the last one shorter
    x = mx.random.normal((2, tokens, WIDTH), key=mx.random.key(1))
    indices, scores = picks(tokens, k, count, used)
    cotangent = mx.random.normal(x.shape, key=mx.random.key(2))
    module = make(kind, count, PACKINGS[packing], bias)
    expected, names = value_and_gradients(module, x, indices, scores, cotangent)
    blocks = Blocks(module)
    assert group_experts(blocks, None) == 1
    held = {n: box[key].nbytes for n, (box, key) in array_slots(module).items() if "lora" not in n}
    one = sum(held.values())
    set_groups(blocks, group * one // count, 1)
    got, _ = value_and_gradients(module, x, indices, scores, cotangent)
    assert_close(got, expected, names)
    if used is not None:  # zero, not what was in memory before
        assert all(mx.all(g[used:] == 0).item() for g in got[3:])


def test_an_expert_that_a_token_picks_twice_counts_twice():
    module = make(glu, 3)
    x = mx.random.normal((2, 4, WIDTH), key=mx.random.key(1))
    indices = mx.array([[[0, 0], [1, 1], [2, 0], [1, 2]]] * 2)
    scores = mx.random.normal(indices.shape, key=mx.random.key(7))
    cotangent = mx.random.normal(x.shape, key=mx.random.key(2))
    expected, names = value_and_gradients(module, x, indices, scores, cotangent)
    blocks = Blocks(module)
    group_experts(blocks, None)
    set_groups(blocks, 1, 1)
    assert_close(value_and_gradients(module, x, indices, scores, cotangent)[0], expected, names)


def test_bfloat16_stays_bfloat16():
    module = make(glu, 4, PACKINGS["affine"])
    for name in ("gate_proj", "up_proj", "down_proj"):
        module[name].linear.set_dtype(mx.bfloat16)
    x = mx.random.normal((2, 9, WIDTH), key=mx.random.key(1)).astype(mx.bfloat16)
    indices, scores = picks(9, 2, 4)
    scores, cotangent = scores.astype(mx.bfloat16), mx.ones(x.shape, mx.bfloat16)
    expected, names = value_and_gradients(module, x, indices, scores, cotangent)
    blocks = Blocks(module)
    group_experts(blocks, None)
    set_groups(blocks, 1, 1)
    got, _ = value_and_gradients(module, x, indices, scores, cotangent)
    assert [a.dtype for a in got] == [a.dtype for a in expected]
    assert_close(
        *[[a.astype(mx.float32) for a in arrays] for arrays in (got, expected)], names, 0.1
    )


def test_only_experts_that_are_picked_are_requested_each_once_in_groups():
    requested, used = [], []
    weights = mx.random.normal((6, 4, 4), key=mx.random.key(1))

    def frozen(experts):
        requested.append(experts)
        return lambda: {"weight": weights[mx.array(experts)]}

    def product(x, own):
        used.append(len(requested))
        return x @ own["weight"].T

    experts = layer.Experts(product, frozen, 2)
    x, indices = mx.ones((3, 4)), mx.array([[5, 0], [0, 3], [3, 5]])
    layer.visit_forward(x, indices, {}, experts)
    assert requested == [[0, 3], [5]]
    assert used == [2, 2, 2]  # the second group is read while the first is used
    visit_backward(x, indices, mx.ones((3, 2, 4)), {}, experts, {})
    assert requested == [[0, 3], [5]] * 2


def test_memory_is_that_of_a_group():
    """Not that of all experts, forward and backward."""
    count, width = 32, 128
    size = 4 * width * width

    def frozen(experts):
        arrays = {"weight": mx.ones((len(experts), width, width))}
        mx.eval(arrays)
        return lambda: arrays

    experts = layer.Experts(lambda x, own: x @ own["weight"].T, frozen, 2)
    x = mx.ones((64, width))
    indices = mx.arange(64)[:, None] % count
    mx.eval(x, indices)
    peaks = []
    for run in (
        lambda: layer.visit_forward(x, indices, {}, experts),
        lambda: visit_backward(x, indices, mx.ones((64, 1, width)), {}, experts, {}),
    ):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        peaks.append((mx.get_peak_memory() - before) / size)
    assert max(peaks) < 8, peaks  # 32 experts; two groups may overlap


@frees_at_once
def test_memory_is_bounded_where_all_tokens_pick_the_same_expert():
    tokens, width, inner = 2048, 32, 512
    weights = {"up": mx.ones((1, inner, width)), "down": mx.ones((1, width, inner))}
    x = mx.ones((tokens, width))
    mx.eval(weights, x)

    def function(x, own):
        return mx.sin(x @ own["up"].T) @ own["down"].T

    experts = layer.Experts(function, lambda experts: lambda: weights, 1)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    indices = mx.zeros((tokens, 1), mx.int32)
    visit_backward(x, indices, mx.ones((tokens, 1, width)), {}, experts, {})
    assert mx.get_peak_memory() - before < 4 * tokens * inner


class Mixing(SwitchGLU):
    """Tokens depend on one another."""

    def __call__(self, x, indices):
        return super().__call__(x - x.mean(axis=-2, keepdims=True), indices)


class Weighted(SwitchGLU):
    """Has an array of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weight = mx.ones(4)


@pytest.mark.parametrize("kind", [Mixing, Weighted])
def test_what_is_no_sum_over_experts_stays_as_it_is(kind):
    assert find_experts(kind(8, 8, 3)) is None


def test_adapters_with_dropout_are_not_grouped():
    module = make(glu, 3)
    module.up_proj.dropout = nn.Dropout(0.1)
    assert find_experts(module) is None
