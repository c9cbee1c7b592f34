"""Products with a packed matrix for each head: those of MLX's own kernel, and less memory."""

import mlx.core as mx
import pytest
from architectures import relative_error
from backends import Holder, exact_reference, frees_at_once
from mlx_lm.models.mla import MultiLinear

from mlx_edgelora.layers import multi_linear
from mlx_edgelora.layers.multi_linear import DequantizedMultiLinear, HeadsMultiLinear

HEADS, TOKENS = 5, 7
PACKINGS = {
    "affine": {"group_size": 32, "bits": 4},
    "eight": {"group_size": 64, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def layer(inputs, outputs, heads=HEADS, packing="affine"):
    mx.random.seed(2)
    made = MultiLinear(inputs, outputs, heads).to_quantized(**PACKINGS[packing])
    mx.eval(made.parameters())
    return made


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_values_and_gradients_are_those_of_mlx(packing, transpose, heads, batch, monkeypatch):
    # Two heads at a time in the backward, the last one alone.
    monkeypatch.setitem(multi_linear.TILE_BYTES, mx.default_device().type, 2 * 4 * 64 * 96)
    made = layer(64, 96, packing=packing)
    inputs, outputs = (64, 96) if transpose else (96, 64)
    x = mx.random.normal((*batch, heads, TOKENS, inputs), key=mx.random.key(3))
    cotangent = mx.random.normal((*batch, HEADS, TOKENS, outputs), key=mx.random.key(4))

    def both(made=made):
        (y,), (dx,) = mx.vjp(lambda x: made(x, transpose=transpose), [x], [cotangent])
        return y, dx

    expected = both(exact_reference(Holder(made)).layer)
    for kind in (DequantizedMultiLinear, HeadsMultiLinear):
        object.__setattr__(made, "__class__", kind)
        for got, wanted in zip(both(), expected, strict=True):
            assert got.shape == wanted.shape
            assert relative_error(got, wanted) < 1e-5


@frees_at_once
def test_the_gradient_of_shared_latents_holds_no_array_of_heads_times_latents():
    heads, tokens, latents = 32, 256, 128
    made = layer(32, latents, heads)
    object.__setattr__(made, "__class__", DequantizedMultiLinear)
    x = mx.random.normal((1, 1, tokens, latents))
    cotangent = mx.random.normal((1, heads, tokens, 32))
    mx.eval(x, cotangent)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, found = mx.vjp(lambda x: made(x, transpose=False), [x], [cotangent])
    mx.eval(found)
    assert mx.get_peak_memory() - before < 0.75 * 4 * heads * tokens * latents
