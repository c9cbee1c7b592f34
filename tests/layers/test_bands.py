"""Tiled attention under a band: queries at positions of their own, that see a window of keys."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

from mlx_edgelora.layers.attention import Band, tiled_attention


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


def keys_seen(band, keys):
    """From the first key that one of the queries sees up to the last one."""
    first, last = int(band.positions[0]), int(band.positions[-1])
    start = 0 if band.window is None else max(0, first - band.window + 1)
    return start, min(last + 1, keys)


def shifted(band, start):
    """The same band over keys that begin at `start`."""
    at = band.positions
    ranged = isinstance(at, range)
    return Band(range(at.start - start, at.stop - start) if ranged else at - start, band.window)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, drawn=bands(), tile_bytes=st.integers(1, 6000))
@pytest.mark.slow
def test_gradients_over_the_keys_that_are_seen_are_those_over_all(shape, drawn, tile_bytes):
    """As tiles of tokens ask for them; the other keys have none."""
    band, keys = drawn
    (q, k, v), cotangent = inputs(*shape, len(band.positions), keys, 7, 5)
    start, stop = keys_seen(band, keys)

    def attend(mask):
        return lambda *x: tiled_attention(*x, scale=SCALE, mask=mask, tile_bytes=tile_bytes)

    seen = [q, *(x[:, :, start:stop] for x in (k, v))]
    output, dq, *parts = both(attend(shifted(band, start)), seen, cotangent)
    around = [(0, 0), (0, 0), (start, keys - stop), (0, 0)]
    got = [output, dq, *(mx.pad(part, around) for part in parts)]
    assert_same(got, both(attend(band), [q, k, v], cotangent), cotangent, 1e-5)


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
    """Keys 0 to 15 of 40; tiles have 7 rows and keys, so that those of both calls are the same."""
    (q, k, v), cotangent = inputs(1, 1, 2, 20, 40, 8, 8)
    band, counts = Band(range(20, 40), 5), []
    for start in (0, 14):
        options = {"scale": SCALE, "mask": shifted(band, start), "tile_bytes": 500}
        arrays = [q, *(x[:, :, start:] for x in (k, v))]
        _, gradients = mx.vjp(lambda *x, o=options: tiled_attention(*x, **o), arrays, [cotangent])
        counts.append([products(x) for x in gradients])
        for x in gradients[1:]:
            assert not x[:, :, : 16 - start].any().item()
            assert x[:, :, 16 - start :].any(axis=(0, 1, 3)).all().item()
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


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
