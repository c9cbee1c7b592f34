"""mlx-lm's causal masks are lazy arrays that know what they mean, while a walk runs."""

import importlib
import sys
import types

import mlx.core as mx
import numpy as np
import pytest
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import base, cache

from mlx_edgelora.blocks import attention
from mlx_edgelora.blocks.attention import (
    PACKAGE,
    attend_bounded,
    banded_masks,
    bounded_attention,
    replace_attention,
)
from mlx_edgelora.blocks.masks import (
    CausalMask,
    band_of,
    pack_masks,
    simplest_mask,
    tiled_mask,
    unpack_masks,
    with_bands,
)
from mlx_edgelora.blocks.parts import TokenSpan, mask_at, visible_keys
from mlx_edgelora.layers.attention import Band

MAKER, ATTENTION = base.create_causal_mask, base.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def undone():
    yield
    assert base.create_causal_mask is cache.create_causal_mask is MAKER
    assert base.scaled_dot_product_attention is ATTENTION


def hidden(tokens):
    return mx.zeros((1, tokens, 1))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 30),
    offset=st.integers(0, 9),
    window=st.none() | st.integers(1, 40),
)
def test_the_values_are_mlx_lms_own_and_the_band_is_theirs(tokens, offset, window):
    expected = MAKER(tokens, offset=offset, window_size=window)
    with banded_masks():
        mask = base.create_causal_mask(tokens, offset=offset, window_size=window)
    assert isinstance(mask, CausalMask)
    assert mx.array_equal(mask, expected).item()
    short = simplest_mask(mask.band.positions, mask.shape[1], mask.band.window)
    if short == "causal":
        short = MAKER(tokens, offset=offset)
    assert short is None or mx.array_equal(short, expected).item()


def test_masks_of_mlx_lms_attention_are_such():
    with banded_masks():
        windowed = base.create_attention_mask(hidden(9), window_size=4)
        whole = base.create_attention_mask(hidden(9), return_array=True)
        assert base.create_attention_mask(hidden(9), window_size=9) == "causal"
    assert windowed.band == Band(range(9), 4)
    assert tiled_mask(windowed, 9, 9) == windowed.band
    assert tiled_mask(whole, 9, 9) == "causal"


def test_a_mask_costs_nothing_until_somebody_wants_its_values(memory):
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with banded_masks():
        mask = base.create_attention_mask(hidden(20_000), window_size=512)
    assert (mask.shape, mask.dtype, mask.ndim) == ((20_000, 20_000), mx.bool_, 2)
    assert band_of(mask)
    assert mx.get_peak_memory() - before < 100_000


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m[None],
        lambda m: m[..., -3:],
        lambda m: m.astype(mx.float32),
        lambda m: mx.where(m, 0.0, -1.0),
        lambda m: m & True,
        lambda m: ~m,
        lambda m: mx.expand_dims(m, 0),
    ],
)
def test_whatever_else_is_done_with_it_gives_a_plain_array(use):
    with banded_masks():
        mask = base.create_causal_mask(7, window_size=3)
    got = use(mask)
    assert type(got) is mx.array
    assert band_of(got) is None
    assert mx.array_equal(got, use(MAKER(7, window_size=3))).item()
    assert band_of(mask) == Band(range(7), 3)


# All that MLX has: a new one must not be missed.
OTHERS = ("__index__", "__init__", "__init_subclass__", "__int__", "__invert__", "__iter__")
IN_PLACE = ["__setitem__"]
IN_PLACE += [name for name in dir(mx.array) if name.startswith("__i") and name not in OTHERS]


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_operation_in_place_makes_it_forget(name):
    """MLX changes the very object: who went by its band would be wrong without a word."""
    with banded_masks():
        mask, plain = base.create_causal_mask(7, window_size=3), MAKER(7, window_size=3)
    args = (0, True) if name == "__setitem__" else (mx.ones((7, 7), mx.bool_),)
    assert name in vars(CausalMask)
    try:
        getattr(plain, name)(*args)
    except (TypeError, ValueError):  # not of bool
        return
    getattr(mask, name)(*args)
    assert mx.array_equal(mask, plain).item()
    assert band_of(mask) is None
    assert tiled_mask(mask, 7, 7) is mask


def test_padding_gets_plain_masks_and_a_cache_one_that_knows_its_offset():
    with banded_masks():
        padded = base.create_causal_mask(4, left_padding=mx.array([1, 0]))
        assert type(padded) is mx.array
        right = base.create_causal_mask(4, 0, 2, mx.array([1, 0]))
        assert type(right) is mx.array
        kept = cache.create_causal_mask(4, offset=2, window_size=3)
    assert kept.band == Band(range(2, 6), 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda n, offset, window: MAKER(n, offset, window and window + 1),
        lambda n, offset, window: ~MAKER(n, offset, window),
        lambda n, offset, window: MAKER(n, 0, window),
        lambda n, offset, window: MAKER(n, offset, window)[None],
    ],
)
def test_a_maker_of_other_masks_is_left_alone(change, monkeypatch):
    monkeypatch.setattr(base, "create_causal_mask", change)
    monkeypatch.setattr(cache, "create_causal_mask", change)
    with banded_masks():
        assert type(base.create_causal_mask(7, 0, 3)) is mx.array
    assert base.create_causal_mask is change
    monkeypatch.undo()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_undone_on_exit_and_on_any_error(error, monkeypatch):
    made = types.ModuleType(PACKAGE + "made")
    made.mask, made.attend = MAKER, ATTENTION
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.delitem(sys.modules, PACKAGE + "helium", raising=False)
    try:
        with bounded_attention():
            assert made.mask is base.create_causal_mask is not MAKER
            assert made.attend is base.scaled_dot_product_attention is not ATTENTION
            late = importlib.import_module(PACKAGE + "helium")
            late.mask = base.create_causal_mask
            with banded_masks():
                assert band_of(made.mask(4, window_size=2)) == Band(range(4), 2)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, GeneratorExit) as caught:
        assert type(caught) is error
    assert made.mask is late.mask is MAKER
    assert made.attend is late.scaled_dot_product_attention is ATTENTION


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 14),
    window=st.none() | st.integers(1, 5) | st.integers(1, 16),
    span=st.tuples(st.integers(0, 13), st.integers(1, 14)),
    keys=st.tuples(st.integers(0, 13), st.integers(1, 14)),
)
def test_masks_of_a_span_are_those_of_the_whole(tokens, window, span, keys):
    def inside(start, stop):
        start = min(start, tokens - 1)
        return TokenSpan(start, min(max(start + 1, stop), tokens))

    whole, span = with_bands(MAKER)(tokens, window_size=window), inside(*span)
    rows = np.array(whole)[span.start : span.stop]
    seen = visible_keys(whole, span, tokens)
    assert seen.stop - seen.start <= span.stop - span.start + (window or tokens) - 1
    assert rows.sum() == rows[:, seen.start : seen.stop].sum()
    masks = [whole, "causal"] if window is None else [whole]
    masks.append(mx.array(np.array(whole)))  # one that does not know what it means
    assert visible_keys(masks[-1], span, tokens) == TokenSpan(0, tokens)
    for part in (seen, inside(*keys), TokenSpan(0, tokens)):
        expected = rows[:, part.start : part.stop]
        if not expected.any(axis=1).all():
            continue
        for mask in masks:
            got = mask_at(mask, span, part)
            if isinstance(got, str):
                assert got == "causal"
                got = MAKER(expected.shape[0], expected.shape[1] - expected.shape[0])
            got = np.full_like(expected, True) if got is None else np.array(got)
            assert (got == expected).all()


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 1, 7), (7, 1), (2, 4, 7, 7)], ids=str)
def test_an_axis_of_one_is_the_same_for_all(shape):
    """MLX does not see an index beyond it."""
    mask = mx.random.normal(shape)
    got = mask_at(mask, TokenSpan(2, 5), TokenSpan(1, 6))
    expected = np.broadcast_to(np.array(mask), np.broadcast_shapes(shape, (7, 7)))
    expected = expected[..., 2:5, 1:6]
    assert np.array_equal(np.broadcast_to(np.array(got), expected.shape), expected)


def test_no_mask_and_one_of_another_name():
    assert mask_at(None, TokenSpan(2, 5), TokenSpan(0, 7)) is None
    assert visible_keys(None, TokenSpan(2, 5), 7) == TokenSpan(0, 7)
    with pytest.raises(ValueError, match="the mask 'banded' is none that attention knows"):
        mask_at("banded", TokenSpan(2, 5), TokenSpan(0, 7))


def qkv(tokens, heads=2):
    keys = mx.random.split(mx.random.key(0), 3)
    return [mx.random.normal((1, heads, tokens, 8), key=key) for key in keys]


def attended(tokens, mask, **options):
    return base.scaled_dot_product_attention(
        *qkv(tokens), cache=None, scale=0.5, mask=mask, **options
    )


@pytest.mark.parametrize("tokens", [9, 600])
def test_bounded_attention_is_the_same_and_does_not_evaluate_a_large_mask(tokens, memory):
    expected = attended(tokens, MAKER(tokens, window_size=5))
    mx.eval(expected)
    with bounded_attention():
        mask = base.create_attention_mask(hidden(tokens), window_size=5)
        before = mx.get_active_memory()
        got = attended(tokens, mask)
        mx.eval(got)
        if tokens == 600:
            assert mx.get_active_memory() - before < got.nbytes + tokens**2 / 2
    assert mx.abs(got - expected).max().item() < 1e-5


def test_a_mask_that_hides_nothing_more_than_the_word_is_the_word(monkeypatch):
    """And MLX has a fused kernel for it."""
    seen = []

    def spy(original, *args, mask, **kwargs):
        seen.append(mask)
        return original(*args, mask=mask, **kwargs)

    monkeypatch.setattr(attention, "use_fused", lambda *_, mask, **__: (mask == "causal", ""))
    monkeypatch.setattr(attention, "TILE_BYTES", 0)
    with replace_attention(spy), replace_attention(attend_bounded), banded_masks():
        attended(9, base.create_attention_mask(hidden(9), return_array=True))
        attended(9, base.create_attention_mask(hidden(9), window_size=5))  # in tiles
    assert seen == ["causal"]


def test_a_mask_of_other_shape_is_taken_as_an_array():
    """A block may give attention fewer queries than its mask has; that is not for tiles."""
    mask = with_bands(MAKER)(9, window_size=3)
    assert tiled_mask(mask, 8, 9) is mask
    late = simplest_mask(range(3, 7), 9, None)  # the last query does not see the last key
    assert tiled_mask(late, 4, 9) == Band(range(3, 7))
    assert tiled_mask(None, 8, 9) is None
    assert tiled_mask("causal", 8, 9) == "causal"


@pytest.mark.parametrize("arguments", [(9, 0, 3), (9, 4, 3), (9, 0, None), (9, 2, 40)])
def test_packed_masks_are_constants_and_come_back(arguments):
    mask = with_bands(MAKER)(*arguments)
    other = mx.ones((2,))
    args, kwargs = pack_masks((mask, other, None), {"mask": mask, "word": "causal"})
    assert isinstance(args[0], str)
    assert args[1] is other
    (back, *rest), named = unpack_masks(args, kwargs)
    assert rest == [other, None] or rest[1] is None
    assert named["word"] == "causal"
    for each in (back, named["mask"]):
        assert each.band == mask.band
        assert mx.array_equal(each, mask).item()
    windows = [pack_masks((with_bands(MAKER)(9, 0, w),), {}) for w in (2, 3, None)]
    assert len({str(each) for each in windows}) == 3


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "ministral3", "cohere2"])
def test_a_model_runs_on_such_masks(name):
    model, tokens = build(name), mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    expected = model(tokens)
    with banded_masks():
        assert mx.array_equal(model(tokens), expected).item()
