"""Scores that are added as a mask: their factors are appended to queries and keys of attention."""

import mlx.core as mx
import pytest
from architectures import relative_error
from backends import frees_at_once
from mlx_lm.models import base
from peaks import above, lowest

from mlx_edgelora.blocks import attention
from mlx_edgelora.blocks.added_scores import AddedScores, factors_of, remembered_factors
from mlx_edgelora.blocks.attention import bounded_attention
from mlx_edgelora.blocks.masks import IN_PLACE, causal_array

ROWS, HEADS, SIZE, ROTARY, VALUES = 2, 3, 8, 4, 5
SCALE = 0.3
LEAST = mx.finfo(mx.float32).min


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def rotary(queries=7, keys=9, shared=True, dtype=mx.float32):
    """Rotary parts of queries and of keys, which heads may share."""
    heads = 1 if shared else HEADS
    return [
        normal(ROWS, HEADS, queries, ROTARY, seed=1, dtype=dtype),
        normal(ROWS, heads, keys, ROTARY, seed=2, dtype=dtype),
    ]


def scores(q_pe, k_pe, mask=None, least=None):
    """As mlx-lm's latent attention makes them."""
    made = (q_pe * SCALE) @ k_pe.swapaxes(-1, -2)
    if mask is None:
        return made
    least = mx.array(mx.finfo(made.dtype).min, made.dtype) if least is None else least
    return mx.where(mask, made, least)


def mask_of(kind, queries, keys):
    positions = range(keys - queries, keys)
    if kind == "sparse":
        seen = mx.random.uniform(shape=(ROWS, 1, queries, keys), key=mx.random.key(5)) < 0.4
        return (seen & causal_array(positions, keys)) | (mx.arange(keys) == 0)
    window = 3 if kind == "window" else None
    return causal_array(positions, keys, window) if kind != "none" else None


@pytest.fixture
def attends_by_tiles(monkeypatch):
    """However few the scores are."""
    monkeypatch.setattr(attention, "TILE_BYTES", 0)


def sized(queries, keys):
    """q, k and v, and a cotangent of the output."""
    sizes = (queries, SIZE), (keys, SIZE), (keys, VALUES), (queries, VALUES)
    return [normal(ROWS, HEADS, *size, seed=3 + i) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("kind", ["causal", "window", "sparse", "none"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 11)])
def test_values_and_all_gradients_are_those_of_mlx(queries, keys, shared, kind, attends_by_tiles):
    *qkv, cotangent = sized(queries, keys)
    parts, added = rotary(queries, keys, shared), []

    def function(q, k, v, q_pe, k_pe):
        mask = scores(q_pe, k_pe, mask_of(kind, queries, keys))
        added.append(factors_of(mask, q, k))
        return base.scaled_dot_product_attention(q, k, v, cache=None, scale=SCALE, mask=mask)

    expected = mx.vjp(function, [*qkv, *parts], [cotangent])
    with bounded_attention():
        got = mx.vjp(function, [*qkv, *parts], [cotangent])
    assert added[0] is None and added[1] is not None
    for one, other in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        assert relative_error(one, other) < 1e-5


def test_in_16_bits_it_is_as_near_to_float32_as_mlx(attends_by_tiles):
    *qkv, _ = sized(40, 40)
    parts = rotary(40, 40)

    def error(dtype):
        arrays = [array.astype(dtype) for array in (*qkv, *parts)]
        q, k, v, q_pe, k_pe = arrays
        mask = scores(q_pe, k_pe, mask_of("causal", 40, 40))
        return base.scaled_dot_product_attention(q, k, v, cache=None, scale=SCALE, mask=mask)

    exact, plain = error(mx.float32), error(mx.bfloat16)
    with bounded_attention():
        got = error(mx.bfloat16)
    assert got.dtype == plain.dtype == mx.bfloat16
    assert relative_error(got.astype(mx.float32), exact) <= 1.1 * relative_error(
        plain.astype(mx.float32), exact
    )


@frees_at_once
def test_no_array_of_heads_by_queries_by_keys_is_made(monkeypatch, memory):
    """Forward and backward, where one such array is many times what the inputs take."""
    monkeypatch.setattr(attention, "TILE_BYTES", 2**14)
    monkeypatch.setattr("mlx_edgelora.layers.attention.TILE_BYTES", 2**14)
    tokens = 500
    *qkv, cotangent = sized(tokens, tokens)
    inputs = [*qkv, *rotary(tokens, tokens)]
    mx.eval(inputs, cotangent)

    def function(q, k, v, q_pe, k_pe):
        mask = scores(q_pe, k_pe, mask_of("causal", tokens, tokens))
        return base.scaled_dot_product_attention(q, k, v, cache=None, scale=SCALE, mask=mask)

    def step():
        found = mx.vjp(function, inputs, [cotangent])[1]
        mx.eval(found)
        return found

    one = 4 * ROWS * HEADS * tokens**2
    with bounded_attention():
        assert lowest(lambda: above(step), one / 2) < one / 2
    assert above(step) > 2 * one  # the measure sees what is held


def test_a_product_keeps_its_values_and_forgets_in_other_operations():
    q_pe, k_pe = rotary()
    expected = scores(q_pe, k_pe, mask_of("causal", 7, 9))
    with remembered_factors():
        made = scores(q_pe, k_pe, mask_of("causal", 7, 9))
        assert isinstance(made, AddedScores) and made.factors is not None
        assert mx.array_equal(made, expected).item()
        for other in (made * 2, made + 1, made.astype(mx.float16), made[:, :1], -made):
            assert type(other) is mx.array
        assert not isinstance(q_pe @ mx.ones((ROTARY, 3)), AddedScores)
        assert not isinstance(q_pe[0] @ k_pe[0].swapaxes(-1, -2), AddedScores)
    assert type(q_pe @ k_pe.swapaxes(-1, -2)) is mx.array


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_operation_in_place_makes_it_forget(name):
    """MLX changes the very object: who went by its factors would be wrong without a word."""
    q_pe, k_pe = rotary()
    with remembered_factors():
        made = scores(q_pe, k_pe)
    args = (0, 1.0) if name == "__setitem__" else (mx.ones((9, 9)),)
    assert name in vars(AddedScores)
    try:
        getattr(scores(q_pe, k_pe), name)(*args)
    except (TypeError, ValueError):  # not of floats, or of other shapes
        return
    getattr(made, name)(*args)
    assert made.factors is None


def test_factors_are_those_of_the_time_of_the_product():
    q_pe, k_pe = rotary()
    mask, plain = mask_of("causal", 7, 9), mask_of("causal", 7, 9)
    before = mx.array(q_pe)
    with remembered_factors():
        left = q_pe + 0
        made = mx.where(mask, left @ k_pe.swapaxes(-1, -2), LEAST)
        left += 1
        mask |= True
    assert mx.array_equal(made.factors.queries, before).item()
    assert mx.array_equal(made.factors.mask, plain).item() and made.factors.mask.band


@pytest.mark.parametrize("least", [mx.array(-1.0), mx.array(-1e9), -1e9, 0.0, mx.zeros((9,))])
def test_what_is_not_hidden_by_the_least_number_is_an_array(least):
    q_pe, k_pe = rotary()
    with remembered_factors():
        made = scores(q_pe, k_pe, mask_of("causal", 7, 9), least)
        assert type(made) is mx.array
        assert type(mx.where(made > 0, LEAST, made)) is mx.array


@pytest.mark.parametrize("least", [LEAST, -float("inf"), mx.array(-float("inf"))])
def test_what_hides_is_the_least_number(least):
    with remembered_factors():
        made = scores(*rotary(), mask_of("causal", 7, 9), least)
    assert made.factors.mask is not None


def test_factors_that_do_not_fit_are_none():
    q, k, *_ = sized(7, 9)
    with remembered_factors():
        fits, fewer = scores(*rotary()), scores(*(array[:1] for array in rotary()))
        grouped = scores(*rotary(shared=False))
    assert factors_of(fits, q, k) and factors_of(grouped, q, k)
    assert factors_of(fits, q, k[:, :1])
    for mask, queries, keys in [
        (fewer, q, k),
        (fits, q[:, :, 1:], k),
        (fits, q, k[:, :, 1:]),
        (grouped, q, k[:, :1]),
        (causal_array(range(2, 9), 9), q, k),
        (None, q, k),
    ]:
        assert factors_of(mask, queries, keys) is None


def test_functions_are_given_back_on_error():
    before = mx.array.__matmul__, mx.where, mx.maximum
    with pytest.raises(RuntimeError, match="stop"), remembered_factors():
        assert mx.where is not before[1]
        raise RuntimeError("stop")
    assert (mx.array.__matmul__, mx.where, mx.maximum) == before


def chosen(q, k, weights):
    """As sparse attention sums scores over heads (`deepseek_v32.Indexer`)."""
    made = mx.maximum(q @ k.swapaxes(-1, -2), 0) * weights
    return sum(made[:, h : h + 1] for h in range(made.shape[1]))


@frees_at_once
def test_scores_that_are_summed_over_heads_are_made_for_one_head_at_a_time(memory):
    heads, queries, keys = 24, 64, 300
    parts = normal(2, heads, queries, SIZE), normal(2, 1, keys, SIZE, seed=1)
    weights, one = normal(2, heads, queries, 1, seed=2), 4 * 2 * queries * keys
    expected = chosen(*parts, weights)
    mx.eval(parts, weights, expected)

    def run():
        found = chosen(*parts, weights)
        mx.eval(found)
        return found

    bound = heads * one / 2
    with remembered_factors():
        got = run()
        assert lowest(lambda: above(run), bound) < bound
    assert mx.array_equal(got, expected).item()
    assert above(run) > heads * one


def test_heads_are_cut_from_scores_as_they_are():
    q, k = rotary()
    weights = normal(ROWS, HEADS, 7, 1)
    expected = mx.maximum(q @ k.swapaxes(-1, -2), 0.5) * weights
    with remembered_factors():
        scaled = mx.maximum(q @ k.swapaxes(-1, -2), 0.5) * weights
        for index in [(slice(None), slice(1, 3)), (slice(None), slice(-1, None)), 0, (0, 1)]:
            assert mx.array_equal(scaled[index], expected[index]).item()
        for added in (1, q[:, :1, :, :1]):
            one, other = added + scaled[:, 1:2], added + expected[:, 1:2]
            assert type(one) is mx.array and mx.array_equal(one, other).item()
        some, others = scaled[:, 1:2], expected[:, 1:2]
        some -= 1
        others -= 1
        assert mx.array_equal(q[:, :1, :, :1] + some, q[:, :1, :, :1] + others).item()
        plain = scaled * 1.0
        assert type(plain) is type(scaled * mx.ones((9,))) is mx.array
        scaled += 1
        expected += 1
        assert mx.array_equal(scaled[:, :1], expected[:, :1]).item()
