"""Tiles that wait for one another: the same values, and few of them in memory."""

import mlx.core as mx
import pytest
from peaks import above, highest, lowest

from mlx_edgelora.layers import linear
from mlx_edgelora.layers.linear import frozen_matmul
from mlx_edgelora.layers.tile_order import depend_on

MIB = 2**20
SETTINGS = {"group_size": 64, "bits": 4}


@pytest.fixture(scope="module")
def packed():
    """A matrix that is 16 tiles of 1 MiB of float32."""
    made = mx.quantize(mx.random.normal((8192, 512), key=mx.random.key(0)), **SETTINGS)
    mx.eval(made)
    return made


@pytest.mark.slow
def test_tiles_wait_for_one_another(packed, memory, monkeypatch):
    x = mx.random.normal((256, 512))
    mx.eval(x)

    def product():
        y = frozen_matmul(x, *packed, tile_bytes=MIB, **SETTINGS)
        mx.eval(y)
        return y

    waiting = product()
    # The output, for a moment twice (its pieces), and half of the matrix.
    bound = 2 * waiting.nbytes + 8 * MIB
    assert lowest(lambda: above(product), bound) < bound
    monkeypatch.setattr(linear, "depend_on", lambda arrays, after: arrays)
    linear._product.cache_clear()
    assert mx.array_equal(product(), waiting).item()
    assert highest(lambda: above(product)) > bound
    linear._product.cache_clear()


@pytest.mark.slow
def test_16_bits_hold_less_than_float32(packed, memory):
    """Tiles of twice the rows held more: unpacking makes 16-bit arrays whatever the dtype is."""
    held = {}
    for dtype in (mx.float32, mx.bfloat16):
        x, cotangent = mx.zeros((16, 512), dtype), mx.ones((16, 8192), dtype)
        mx.eval(x, cotangent)

        def gradient(x=x, cotangent=cotangent):
            function = lambda x: frozen_matmul(x, *packed, tile_bytes=MIB, **SETTINGS)  # noqa: E731
            mx.eval(mx.vjp(function, [x], [cotangent])[1])

        held[dtype] = highest(lambda gradient=gradient: above(gradient))
    assert held[mx.bfloat16] < 0.75 * held[mx.float32]


def test_an_array_that_waits_is_the_same():
    a, b = mx.arange(3), mx.ones(3)
    assert depend_on([a], [])[0] is a
    (made,) = depend_on([a], [b])
    assert mx.array_equal(made, a).item()
