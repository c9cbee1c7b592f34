"""The gated MLP in slices: the same as layer by layer, and never tokens x intermediate."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import relative_error
from backends import frees_at_once
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.layers.mlp import (
    MOST_SLICES,
    Packing,
    Projection,
    gated_mlp,
    slice_features,
)

MIB = 2**20
ACTIVATIONS = {
    "silu": lambda a, b: nn.silu(a) * b,
    "gelu": lambda a, b: nn.gelu_approx(a) * b,
    "clipped": lambda a, b: mx.minimum(a, 1.0) * mx.clip(b, -1.0, 1.0) + b,
}


def projection(out, width, key, *, packed=False, rank=3, bias=False, gain=False, group=32):
    keys = mx.random.split(mx.random.key(key), 5)
    weight = mx.random.normal((out, width), key=keys[0]) * width**-0.5
    fields = {"weight": weight}
    if packed:
        names = ("weight", "scales", "biases")
        fields = dict(zip(names, mx.quantize(weight, group, 4), strict=True))
        fields["packing"] = Packing(group, 4)
    if bias:
        fields["bias"] = mx.random.normal((out,), key=keys[1])
    if rank:
        fields["lora_a"] = 0.3 * mx.random.normal((width, rank), key=keys[2])
        fields["lora_b"] = 0.3 * mx.random.normal((rank, out), key=keys[3])
        fields["scale"] = 2.0
    if gain:
        fields["gain"] = 1 + 0.3 * mx.random.normal((out,), key=keys[4])
    return Projection(**fields)


def dense(p):
    if p.packing is None:
        return p.weight
    return mx.dequantize(p.weight, p.scales, p.biases, **p.packing._asdict())


def linear(p, x):
    y = x @ dense(p).T.astype(x.dtype)
    if p.lora_a is not None:
        y = y + (p.scale * (x @ p.lora_a.astype(x.dtype))) @ p.lora_b.astype(x.dtype)
    if p.gain is not None:
        y = p.gain.astype(x.dtype) * y
    return y if p.bias is None else y + p.bias.astype(x.dtype)


def trained(projections):
    names = ("lora_a", "lora_b", "gain")
    every = [(i, name) for i in range(len(projections)) for name in names]
    return [(i, name) for i, name in every if getattr(projections[i], name) is not None]


def gradients(function, x, cotangent, projections):
    """Output, gradient of x and of every LoRA matrix and gain."""
    places = trained(projections)

    def run(x, *values):
        changed = list(projections)
        for (index, name), value in zip(places, values, strict=True):
            changed[index] = replace(changed[index], **{name: value})
        return function(x, *changed)

    primals = [x, *(getattr(projections[i], n) for i, n in places)]
    outputs, found = mx.vjp(run, primals, [cotangent])
    mx.eval(outputs, found)
    return [*outputs, *found]


def both(x, projections, activation, tile_bytes):
    cotangent = mx.random.normal((*x.shape[:-1], projections[2].out_dims), key=mx.random.key(9))
    cotangent = cotangent.astype(x.dtype)

    def plain(x, first, second, down):
        return linear(down, activation(linear(first, x), linear(second, x)))

    def sliced(x, *three):
        return gated_mlp(x, *three, activation, tile_bytes=tile_bytes)

    return gradients(plain, x, cotangent, projections), gradients(sliced, x, cotangent, projections)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    width=st.sampled_from([32, 64]),
    groups=st.integers(1, 5),
    packed=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    ranks=st.tuples(*[st.sampled_from([0, 1, 3])] * 3),
    bias=st.booleans(),
    gain=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    tile_bytes=st.integers(1, 60_000),
)
def test_equals_layer_by_layer(
    tokens, width, groups, packed, ranks, bias, gain, activation, tile_bytes
):
    features = 32 * groups
    shapes = [(features, width), (features, width), (width, features)]
    projections = [
        projection(*shape, key, packed=p, rank=r, bias=bias, gain=gain and key < 2)
        for key, (shape, p, r) in enumerate(zip(shapes, packed, ranks, strict=True))
    ]
    x = mx.random.normal((1, tokens, width), key=mx.random.key(tokens))
    expected, got = both(x, projections, ACTIVATIONS[activation], tile_bytes)
    for one, other in zip(expected, got, strict=True):
        assert mx.linalg.norm(one.reshape(-1)).item() > 0
        assert other.shape == one.shape
        assert relative_error(other, one) < 1e-5


def test_more_tokens_than_a_chunk():
    shapes = [(96, 32), (96, 32), (32, 96)]
    projections = [
        projection(*shape, key, packed=True, gain=key < 2) for key, shape in enumerate(shapes)
    ]
    x = mx.random.normal((2, 1100, 32), key=mx.random.key(0))
    for one, other in zip(*both(x, projections, ACTIVATIONS["silu"], 40_000), strict=True):
        assert relative_error(other, one) < 1e-5


def test_bfloat16_is_as_near_as_layer_by_layer():
    """Sums over slices are float32, so many slices cost no digits."""
    shapes = [(512, 64), (512, 64), (64, 512)]
    projections = [projection(*shape, key, packed=True) for key, shape in enumerate(shapes)]
    x = mx.random.normal((17, 64), key=mx.random.key(0))
    truth, _ = both(x, projections, ACTIVATIONS["silu"], 10**6)
    plain, got = both(x.astype(mx.bfloat16), projections, ACTIVATIONS["silu"], 1)
    for true, one, other in zip(truth, plain, got, strict=True):
        assert other.dtype == one.dtype
        assert relative_error(other, true) < 1.5 * relative_error(one, true) + 1e-3


@frees_at_once
def test_holds_slices_only(memory):
    tokens, width, features = 256, 256, 4096
    shapes = [(features, width), (features, width), (width, features)]
    projections = [projection(*shape, key, packed=True) for key, shape in enumerate(shapes)]
    x = mx.random.normal((tokens, width))
    mx.eval(x, [[p.weight, p.scales, p.biases, p.lora_a, p.lora_b] for p in projections])
    activation = ACTIVATIONS["silu"]
    peaks = {}
    for name, tile_bytes in (("slices", MIB // 2), ("whole", 10**9)):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = gradients(
            lambda x, *three, size=tile_bytes: gated_mlp(x, *three, activation, tile_bytes=size),
            x,
            mx.ones_like(x),
            projections,
        )
        peaks[name] = mx.get_peak_memory() - before
        del found
    whole = 4 * tokens * features
    assert peaks["slices"] < whole  # less than one array of tokens x intermediate
    assert peaks["whole"] > 5 * whole


def test_a_gain_of_down_is_refused():
    first, second, down = (projection(32, 32, key, gain=True) for key in range(3))
    with pytest.raises(ValueError, match="got a gain of down"):
        gated_mlp(mx.zeros((3, 32)), first, second, down, ACTIVATIONS["silu"])


def test_matrices_that_do_not_fit_are_refused():
    good = [projection(64, 32, 0), projection(64, 32, 1), projection(32, 64, 2)]
    with pytest.raises(ValueError, match=r"gated MLP: got x \(3, 31\)"):
        gated_mlp(mx.zeros((3, 31)), *good, ACTIVATIONS["silu"])
    with pytest.raises(ValueError, match="expected"):
        gated_mlp(mx.zeros((3, 32)), good[0], projection(96, 32, 1), good[2], ACTIVATIONS["silu"])


@pytest.mark.parametrize("group", [1, 64])
@pytest.mark.parametrize("intermediate", [64, 8192, 11008, 28672])
def test_slices_are_whole_groups_and_not_too_many(group, intermediate):
    for tile_bytes in (1, 4 * 2**20, 64 * 2**20):
        features = slice_features(tile_bytes, 3 * 2048, 512, intermediate, group)
        assert features % group == 0
        assert -(-intermediate // features) <= MOST_SLICES
        entry = 4 * (3 * 2048 + 6 * 512)
        least = max(group, -(-intermediate // MOST_SLICES) + group - 1)
        assert features * entry <= max(tile_bytes, least * entry)
