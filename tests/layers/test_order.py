"""Evaluations that stop at each tile: the same values, and one tile in memory."""

import mlx.core as mx
from architectures import relative_error
from peaks import above, highest, lowest

from mlx_edgelora.layers.linear import frozen_matmul
from mlx_edgelora.layers.order import stop, stops, wait

MIB = 2**20
SETTINGS = {"group_size": 64, "bits": 4}


def gradient(x, packed, cotangent):
    def product(x):
        return frozen_matmul(x, *packed, tile_bytes=MIB, **SETTINGS)

    return mx.vjp(product, [x], [cotangent])[1][0]


def test_one_tile_is_held_where_mlx_runs_ahead(memory):
    packed = mx.quantize(mx.random.normal((8192, 512), key=mx.random.key(0)), **SETTINGS)
    x, cotangent = mx.zeros((256, 512)), mx.random.normal((256, 8192), key=mx.random.key(1))
    mx.eval(packed, x, cotangent)

    def at_once():
        dx = gradient(x, packed, cotangent)
        mx.eval(dx)
        return dx

    def in_steps():
        with stops() as order:
            dx = gradient(x, packed, cotangent)
        order.eval()
        mx.eval(dx)
        return dx

    assert relative_error(in_steps(), at_once()) < 1e-6
    bound = 6 * MIB  # a tile: its numbers in float32, twice while they are scaled, and in 16 bits
    assert lowest(lambda: above(in_steps), bound) < bound
    assert highest(lambda: above(at_once)) > 1.5 * bound


def test_16_bits_hold_less_than_float32(memory):
    """Tiles of twice the rows held more: unpacking makes 16-bit arrays whatever the dtype is."""
    packed = mx.quantize(mx.random.normal((8192, 512), key=mx.random.key(0)), **SETTINGS)
    mx.eval(packed)
    held = {}
    for dtype in (mx.float32, mx.bfloat16):
        cotangent = mx.ones((16, 8192), dtype)
        mx.eval(cotangent)
        with stops() as order:
            dx = gradient(mx.zeros((16, 512), dtype), packed, cotangent)
        held[dtype] = above(order.eval)
        del dx
    assert held[mx.bfloat16] < 0.75 * held[mx.float32]


def test_a_stop_is_the_array_as_it_was(memory):
    """What is written into it later comes later; else the first stop would compute everything."""
    whole, ones = mx.zeros(MIB), mx.ones(MIB)
    mx.eval(whole, ones)
    with stops() as order:
        whole = whole + ones
        stop([whole])
        whole[:1] = mx.random.normal((4 * MIB,)).sum()[None]
    first = order._stops[0]
    assert above(lambda: mx.eval(first)) < 8 * MIB
    order.eval()
    assert whole[1].item() == 1


def test_nothing_is_collected_outside_or_of_what_is_cleared():
    a, b = mx.ones(3), mx.ones(3)
    assert wait([a], [])[0] is a
    with stops() as order:
        wait([a], [b])
        assert len(order._stops) == 1
        order.clear()
        with stops() as inner:
            stop([a])
        assert len(inner._stops) == 1
    wait([a], [b])
    assert not order._stops
