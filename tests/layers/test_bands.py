"""Tiled attention under a band: queries at positions of their own, that see a window of keys."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import above, lowest
from test_tiled_attention import (
    METAL,
    SCALE,
    assert_same,
    both,
    choice,
    inputs,
    normal,
    plain_attention,
    products,
)

from mlx_edgelora.layers.attention import (
    Band,
    attention_backward,
    attention_forward,
    tiled_attention,
)
from mlx_edgelora.layers.order import stops


def array_of(band, keys):
    ago = np.array(band.positions)[:, None] - np.arange(keys)
    return mx.array((ago >= 0) & (ago < (band.window or keys + ago.max() + 1)))


@st.composite
def bands(draw):
    """Positions among up to 60 keys, each seeing at least one; and the number of keys."""
    keys = draw(st.integers(1, 60))
    window = draw(st.none() | st.integers(1, 70))
    last = keys + 5 if window is None else keys + window - 2
    if draw(st.booleans()):
        start = draw(st.integers(0, last))
        positions = range(start, draw(st.integers(start, min(last, start + 50))) + 1)
    else:
        chosen = draw(st.sets(st.integers(0, last), min_size=1, max_size=40))
        positions = np.array(sorted(chosen), np.int32)
    return Band(positions, window), keys


shapes = st.tuples(*[st.integers(1, most) for most in (2, 2, 3)])


@settings(max_examples=80, deadline=None)
@given(shape=shapes, drawn=bands(), tile_bytes=st.integers(1, 6000), sinks=st.booleans())
def test_exact_under_a_band(shape, drawn, tile_bytes, sinks):
    band, keys = drawn
    arrays, cotangent = inputs(*shape, len(band.positions), keys, 7, 5)
    extra = [2 * normal((arrays[0].shape[1],), 5)] if sinks else []

    def tiled(q, k, v, *sinks):
        sinks = sinks[0] if sinks else None
        return tiled_attention(q, k, v, scale=SCALE, mask=band, sinks=sinks, tile_bytes=tile_bytes)

    got = both(tiled, arrays + extra, cotangent)
    mask = array_of(band, keys)
    expected = both(lambda *x: plain_attention(*x, mask=mask), arrays + extra, cotangent)
    assert_same(got, expected, cotangent, 1e-5)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, drawn=bands(), tile_bytes=st.integers(1, 6000), part=st.integers(1, 60))
def test_gradients_of_parts_of_the_keys_are_those_of_all(shape, drawn, tile_bytes, part):
    """In a part some queries see nothing, whole tiles of them included."""
    band, keys = drawn
    (q, k, v), cotangent = inputs(*shape, len(band.positions), keys, 7, 5)
    options = {"scale": SCALE, "tile_bytes": tile_bytes}
    output, statistics = attention_forward(q, k, v, mask=band, sinks=None, **options)
    dq, total, dkv = mx.zeros(q.shape), mx.zeros(q.shape), []
    for start in range(0, keys, part):
        at = band.positions
        shifted = range(at.start - start, at.stop - start) if isinstance(at, range) else at - start
        arrays = q, *(x[:, :, start : start + part] for x in (k, v))
        arrays += (output, statistics), cotangent
        options["mask"] = Band(shifted, band.window)
        more, *pair = attention_backward(*arrays, **options)
        total, *_ = attention_backward(*arrays, dq=total, **options)
        dq, dkv = dq + more, [*dkv, pair]
    assert_same([total], [dq], cotangent, 1e-6)
    got = [output, dq, *(mx.concatenate(x, axis=2) for x in zip(*dkv, strict=True))]
    mask = array_of(band, keys)
    expected = both(lambda *x: plain_attention(*x, mask=mask), [q, k, v], cotangent)
    assert_same(got, expected, cotangent, 1e-5)


def test_a_window_alone_is_the_causal_mask_with_a_window():
    arrays, cotangent = inputs(1, 2, 2, 30, 40, 8, 8)
    got = both(
        lambda *x: tiled_attention(*x, scale=SCALE, mask=Band(window=9), tile_bytes=900),
        arrays,
        cotangent,
    )
    expected = both(lambda *x: plain_attention(*x, mask="causal", window=9), arrays, cotangent)
    assert_same(got, expected, cotangent, 1e-5)


@pytest.mark.parametrize(
    ("band", "tiles"),
    [
        (Band(range(2048)), 21),  # of 6 x 6
        (Band(range(2048), 9), 11),
        (Band(np.arange(2048), 400), 15),
        (Band(range(1000, 2056), 9), 6),  # of 3 x 6: each row of tiles lies over two columns
    ],
)
def test_tiles_a_band_hides_are_not_computed(band, tiles):
    """For each of four key heads, with two products each."""
    arrays, _ = inputs(1, 4, 2, len(band.positions), 2048, 32, 32)
    assert products(tiled_attention(*arrays, scale=SCALE, mask=band)) == 2 * 4 * tiles


def test_a_gradient_of_keys_nobody_sees_is_zero_and_costs_no_product():
    (q, k, v), cotangent = inputs(1, 1, 2, 40, 40, 8, 8)
    output, statistics = attention_forward(
        q, k, v, scale=SCALE, mask=Band(range(40), 5), sinks=None, tile_bytes=500
    )
    got = attention_backward(
        q[:, :, 20:],
        k[:, :, :10],
        v[:, :, :10],
        (output[:, :, 20:], statistics[:, :, 20:]),
        cotangent[:, :, 20:],
        scale=SCALE,
        mask=Band(range(20, 40), 5),
        tile_bytes=500,
    )
    assert [x.shape for x in got] == [(1, 2, 20, 8), (1, 1, 10, 8), (1, 1, 10, 8)]
    for x in got:
        assert products(x) == 0
        assert not x.any().item()


@pytest.mark.parametrize(
    ("band", "message"),
    [
        (Band(window=0), "1 or more; got 0"),
        (Band(range(5)), "6 ascending ones"),
        (Band(range(0, 12, 2)), "in steps of 1"),
        (Band(np.array([0, 1, 1, 3, 4, 5])), "ascending"),
        (Band(range(-1, 5)), r"positions -1 to 4 .* over 6 keys"),
        (Band(range(3, 9), 3), r"a window of 3 over 6 keys"),
    ],
)
def test_what_does_not_fit_is_refused(band, message):
    arrays, _ = inputs(1, 1, 2, 6, 6, 4, 4)
    with pytest.raises(ValueError, match=message):
        tiled_attention(*arrays, scale=SCALE, mask=band)


def test_arrays_of_positions_are_not_kept():
    """They are other ones in every batch; ranges come again and are compiled once."""
    from mlx_edgelora.layers.attention import _attention

    arrays, _ = inputs(1, 1, 1, 6, 6, 4, 4)
    tiled_attention(*arrays, scale=SCALE, mask=Band(range(6), 2))
    before = _attention.cache_info().currsize
    tiled_attention(*arrays, scale=SCALE, mask=Band(np.arange(6), 2))
    tiled_attention(*arrays, scale=SCALE, mask=Band(range(6), 2))
    assert _attention.cache_info().currsize == before


def test_a_band_is_never_fused():
    fused, reason = choice(METAL, mask=Band(range(256), 9))
    assert not fused
    assert "band" in reason


def test_gradients_of_queries_are_added_up_in_place(memory):
    """In 16 bits a sum beside each part, and the part in both widths, would be twice as much."""
    (q, k, v), cotangent = inputs(1, 32, 2, 256, 256, 64, 64, mx.bfloat16)
    options = {"scale": SCALE, "mask": Band(range(256)), "tile_bytes": 2**17}
    output, statistics = attention_forward(q, k, v, sinks=None, **options)
    mx.eval(q, k, v, cotangent, output, statistics)
    held = [mx.zeros(q.shape)]
    mx.eval(held)

    def add_part():
        with stops() as order:
            dq, *pair = attention_backward(
                q, k, v, (output, statistics), cotangent, dq=held.pop(), **options
            )
        order.eval()
        mx.eval(dq, pair)
        held.append(dq)

    add_part()
    sums = held[0].nbytes
    # Beside it: tiles of scores, and a key head's results as well as its part of the sum.
    assert lowest(lambda: above(add_part), sums) < sums
