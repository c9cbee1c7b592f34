"""Attention that makes keys and values of some heads at a time: as with those of all heads."""

import mlx.core as mx
import pytest
from architectures import relative_error
from backends import frees_at_once
from mlx_lm.models.mla import MultiLinear

from mlx_edgelora.layers import head_attention
from mlx_edgelora.layers.attention import tiled_attention
from mlx_edgelora.layers.head_attention import HeadProduct, attend_by_heads, heads_at_a_time
from mlx_edgelora.layers.multi_linear import (
    DequantizedMultiLinear,
    HeadsMultiLinear,
    UnpackedMultiLinear,
)

LATENTS, SIZE, ROTARY = 64, 32, 12


def layer(kind, inputs, outputs, heads, seed):
    mx.random.seed(seed)
    made = MultiLinear(inputs, outputs, heads)
    if kind is not UnpackedMultiLinear:
        made = made.to_quantized(32, 4)
    made.freeze()
    object.__setattr__(made, "__class__", kind)
    mx.eval(made.parameters())
    return made


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


MASKS = {
    "floating": lambda heads, q, k: normal(2, heads, q, k, seed=5),
    "floating, of all heads": lambda heads, q, k: normal(2, 1, q, k, seed=5),
    "bool": lambda heads, q, k: mx.tri(q, k, k - q, dtype=mx.int32).astype(mx.bool_),
    "causal": lambda heads, q, k: "causal",
    "none": lambda heads, q, k: None,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", [DequantizedMultiLinear, HeadsMultiLinear, UnpackedMultiLinear])
@pytest.mark.parametrize("added", ["nothing", "of one key head", "of all heads"])
def test_values_and_gradients_are_those_of_all_heads_at_once(mask, kind, added, monkeypatch):
    heads, queries, keys = 5, 11, 19
    more = 0 if added == "nothing" else ROTARY
    # Two heads at a time, the last one alone.
    monkeypatch.setattr(head_attention, "HEAD_BYTES", 2 * 4 * 2 * keys * (2 * SIZE + more))
    down = layer(kind, SIZE, LATENTS, heads, 1)
    up = layer(kind, LATENTS, SIZE, heads, 2)
    given, scale = MASKS[mask](heads, queries, keys), SIZE**-0.5
    floats = [given] if mask.startswith("floating") else []
    parts = [
        normal(2, heads, queries, ROTARY, seed=6),
        normal(2, 1 if added == "of one key head" else heads, keys, ROTARY, seed=7),
    ]
    parts = parts if more else []
    cotangent = normal(2, heads, queries, SIZE, seed=3)

    def run(attend):
        def function(q, latents, *others):
            k, v = down(latents, transpose=False), up(mx.sin(latents))
            assert isinstance(k, HeadProduct) and heads_at_a_time(k, v, more) == 2
            own = others[-1] if floats else given
            return attend(q, k, v, scale=scale, mask=own, added=others[: len(parts)])

        inputs = [normal(2, heads, queries, SIZE, seed=1), normal(2, 1, keys, LATENTS, seed=2)]
        out, found = mx.vjp(function, [*inputs, *parts, *floats], [cotangent])
        return [*out, *found]

    def of_all_heads(q, k, v, *, scale, mask, added):
        """By plain operations."""
        scores = scale * (q @ k.swapaxes(-1, -2))
        if added:
            scores = scores + added[0] @ added[1].swapaxes(-1, -2)
        if isinstance(mask, str):
            mask = MASKS["bool"](heads, queries, keys)
        if mask is not None and mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
        elif mask is not None:
            scores = scores + mask
        return mx.softmax(scores, axis=-1) @ v

    got, expected = run(attend_by_heads), run(of_all_heads)
    assert len(got) == 3 + len(parts) + len(floats)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < 1e-5


@frees_at_once
def test_keys_and_values_of_all_heads_are_not_in_memory(monkeypatch):
    heads, queries, keys = 64, 32, 512
    monkeypatch.setattr(head_attention, "HEAD_BYTES", 4 * 4 * keys * 2 * SIZE)
    down = layer(DequantizedMultiLinear, SIZE, LATENTS, heads, 1)
    up = layer(DequantizedMultiLinear, LATENTS, SIZE, heads, 2)
    inputs = [normal(1, heads, queries, SIZE, seed=1), normal(1, 1, keys, LATENTS, seed=2)]
    cotangent = normal(1, heads, queries, SIZE, seed=3)
    mx.eval(inputs, cotangent)
    peaks = []
    for attend in (attend_by_heads, tiled_attention):

        def function(q, latents, attend=attend):
            k, v = down(latents, transpose=False), up(latents)
            return attend(q, k, v, scale=1.0, mask=None)

        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.vjp(function, inputs, [cotangent])[1])
        peaks.append(mx.get_peak_memory() - before)
    both = 4 * heads * keys * 2 * SIZE
    assert peaks[0] < both < peaks[1] / 2


def test_a_trained_matrix_is_multiplied_for_all_heads_at_once():
    """Gradients of what attention makes some heads at a time from are not computed."""
    made = layer(UnpackedMultiLinear, SIZE, LATENTS, 3, 1)
    x = normal(1, 1, 5, LATENTS)
    assert isinstance(made(x, transpose=False), HeadProduct)
    made.unfreeze()
    assert type(made(x, transpose=False)) is mx.array
    made.freeze()
    assert type(made(normal(1, 3, 5, LATENTS), transpose=False)) is mx.array
