"""A block for a part of its tokens: the same rows and gradients, and less work."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.base import create_causal_mask
from part_helpers import assert_rows_equal_whole, assert_tiles_equal_whole

from mlx_edgelora.blocks.attention import replace_attention
from mlx_edgelora.blocks.masks import simplest_mask
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.engine.functions import rows_of
from mlx_edgelora.engine.walk import check_row_indices


def llama_block(**changes):
    return build("llama", hidden_size=32, intermediate_size=24, head_dim=8, **changes).layers[-1]


def masks(kind, batch, tokens, window, seed):
    """A mask of every form that mlx-lm's attention takes; each token sees something."""
    rng = np.random.RandomState(seed)
    seen = rng.rand(batch, 1, tokens, tokens) < 0.6
    seen = (seen & np.tril(np.ones((tokens, tokens), bool))) | np.eye(tokens, dtype=bool)
    keys = rng.rand(batch, 1, 1, tokens) < 0.7
    keys[..., 0] = True
    added = mx.where(mx.array(seen), mx.array(rng.randn(*seen.shape), mx.float32), -1e9)
    return {
        "none": None,
        "causal": "causal",
        "array": create_causal_mask(tokens, window_size=window),
        "banded": simplest_mask(range(tokens), tokens, window),  # knows what it means
        "per row": mx.array(seen),
        "shared": mx.array(seen[:1]),
        "added": added,
        "per head": mx.array(rng.randn(batch, 4, tokens, tokens), mx.float32),
        "keys": mx.array(keys),  # the same for all queries
    }[kind]


KINDS = ("causal", "none", "array", "banded", "per row", "shared", "added", "per head", "keys")


@st.composite
def label_patterns(draw, batch, tokens):
    """Ascending rows: scattered, one, the first or last of each row, one run, all."""
    count = batch * tokens
    kind = draw(st.sampled_from(["scattered", "one", "first", "last", "run", "all"]))
    if kind == "one":
        return [draw(st.integers(0, count - 1))]
    if kind == "run":
        start = draw(st.integers(0, count - 1))
        return list(range(start, draw(st.integers(start, count - 1)) + 1))
    if kind in ("first", "last"):
        some = draw(st.sets(st.integers(0, batch - 1), min_size=1))
        return [row * tokens + (tokens - 1 if kind == "last" else 0) for row in sorted(some)]
    if kind == "all":
        return list(range(count))
    return sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))


INPUTS = {
    "data": st.data(),
    "batch": st.integers(1, 3),
    "tokens": st.integers(1, 11),
    "window": st.none() | st.integers(1, 6),
    "kv_heads": st.sampled_from([1, 2, 4]),
    "kind": st.sampled_from(KINDS),
}


@settings(max_examples=60, deadline=None)
@given(**INPUTS)
def test_rows_and_gradients_equal_the_whole_blocks(data, batch, tokens, window, kv_heads, kind):
    rows = data.draw(label_patterns(batch, tokens))
    block = llama_block(num_key_value_heads=kv_heads, num_hidden_layers=1)
    x = mx.random.normal((batch, tokens, 32), key=mx.random.key(tokens))
    mask = masks(kind, batch, tokens, window, seed=len(rows))
    assert_rows_equal_whole(block, rows, x, mask, None)


@settings(max_examples=60, deadline=None)
@given(**INPUTS, all_rows=st.booleans())
@pytest.mark.slow
def test_tiles_and_gradients_equal_the_whole_blocks(
    data, batch, tokens, window, kv_heads, kind, all_rows
):
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1)))) if tokens > 1 else []
    rows = None if all_rows else data.draw(label_patterns(batch, tokens))
    block = llama_block(num_key_value_heads=kv_heads, num_hidden_layers=1)
    x = mx.random.normal((batch, tokens, 32), key=mx.random.key(tokens))
    mask = masks(kind, batch, tokens, window, seed=len(cuts))
    assert_tiles_equal_whole(block, cuts, x, mask, None, rows=rows)


ROWS = [0, 3, 4, 8, 19, 20, 21, 22]  # scattered in one row, none in the next, one run


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_mask(kind):
    """Chance may leave one out above."""
    block, x, mask = llama_block(), mx.random.normal((3, 9, 32)), masks(kind, 3, 9, 4, 0)
    assert_rows_equal_whole(block, ROWS, x, mask, None)
    assert_tiles_equal_whole(block, [2, 7], x, mask, None)
    assert_tiles_equal_whole(block, [2, 7], x, mask, None, rows=ROWS)


@pytest.mark.parametrize("kind", ["causal", "none", "array", "banded"])
def test_tiles_of_a_block_that_is_cut_at_its_cache(kind):
    """A mask of every form that such a block may be given by mlx-lm."""
    block, x = llama_block(), mx.random.normal((3, 9, 32))
    mask = masks(kind, 3, 9, 4, 0)
    assert_tiles_equal_whole(block, [2, 7], x, mask, None, through_cache=True)
    assert_tiles_equal_whole(block, [], x, mask, None, through_cache=True)


def test_arguments_by_name_or_left_out():
    block, x = llama_block(), mx.random.normal((2, 5, 32))
    assert_rows_equal_whole(block, [1, 7], x, mask="causal", cache=None)
    assert_rows_equal_whole(block, [1, 7], x, cache=None, mask=None)
    assert_rows_equal_whole(block, [1, 7], x, mask="causal")
    assert_rows_equal_whole(block, [1, 7], x)


def test_the_input_of_a_token_without_label_gets_a_gradient_through_its_key():
    gradients = assert_rows_equal_whole(
        llama_block(), [6], mx.random.normal((2, 5, 32)), "causal", None
    )
    norms = mx.linalg.norm(gradients["x"], axis=-1)
    assert (norms > 0).tolist() == [[False] * 5, [True, True, False, False, False]]


def test_what_lies_behind_attention_is_computed_for_the_rows_alone(monkeypatch):
    """The saving itself: how many tokens reach attention and the MLP."""
    block, seen = llama_block(), []
    kind = type(block.mlp)
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda s, x: seen.append(x.size // 32) or call(s, x))

    def spy(original, queries, keys, values, cache, scale, mask, sinks=None):
        seen.append((queries.shape[2], keys.shape[2], mask if isinstance(mask, str) else "array"))
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)

    x, parts = mx.random.normal((3, 10, 32)), BlockParts(block, ("causal", None), {})
    span = TokenSpan(3, 6)
    with replace_attention(spy):
        out = parts.output_rows(x, mx.array([3, 4, 5, 20, 24]))
        assert seen == [(10, 10, "causal"), 5]
        assert out.shape == (1, 5, 32)
        seen.clear()
        kept = parts.key_values(x[:, :6], TokenSpan(0, 6))
        assert seen == []
        out = parts.output_at(x[:, 3:6], span, TokenSpan(0, 6), kept, mx.array([0, 8]))
        assert seen == [(3, 6, "causal"), 2]  # no array for a mask, nor the keys behind it
        assert out.shape == (1, 2, 32)
        seen.clear()
        parts.output(x[:, 3:6], span, TokenSpan(0, 6), kept)
        assert seen == [(3, 6, "causal"), 9]


def test_what_is_begun_and_not_needed_is_never_computed(memory):
    """Queries are in the graph of the call that keys are taken from, whose end nobody asks for."""
    block = llama_block(num_attention_heads=256, num_key_value_heads=1)
    x, every = mx.random.normal((1, 512, 32)), TokenSpan(0, 512)
    parts = BlockParts(block, ("causal", None), {})
    queries = 512 * 256 * 8 * 4

    def peak(function):
        mx.eval(x, block.parameters())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function())
        return mx.get_peak_memory() - before

    assert peak(lambda: block.self_attn.q_proj(x)) >= queries
    assert peak(lambda: parts.key_values(x, every)) < queries / 2


def test_the_block_must_ask_attention_or_its_cache_once():
    block, x, every = llama_block(), mx.zeros((1, 5, 32)), TokenSpan(0, 5)
    parts, cut = (BlockParts(block, ("causal", None), {}, through) for through in (False, True))
    kept, rows, attend = parts.key_values(x, every), mx.array([1]), block.self_attn
    block.self_attn = lambda x, mask, cache: attend(x, mask, cache) + attend(x, mask, cache)
    with pytest.raises(RuntimeError, match="it asks attention 2 times, expected once"):
        parts.output(x, every, every, kept)
    with pytest.raises(RuntimeError, match="it asks attention 2 times, expected once"):
        parts.output_rows(x, rows)
    with pytest.raises(RuntimeError, match="it asks its cache 2 times, expected once"):
        cut.output(x, every, every, kept)
    block.self_attn = lambda x, mask, cache: x
    with pytest.raises(RuntimeError, match="it does not call mlx-lm's attention"):
        parts.output_rows(x, rows)
    with pytest.raises(RuntimeError, match="it asks attention 0 times, expected once"):
        parts.output(x, every, every, kept)
    with pytest.raises(RuntimeError, match="its cache is not asked for keys and values"):
        cut.key_values(x, every)


def test_a_mask_of_another_name_is_an_error():
    x = mx.random.normal((1, 5, 32))
    with pytest.raises(ValueError, match="the mask 'banded' is none that attention knows"):
        BlockParts(llama_block(), ("banded", None), {}).output_rows(x, mx.array([1]))


@pytest.mark.parametrize(
    "rows",
    [[], [3, 2], [1, 1], [-1, 2], [0, 10], [10], [[0, 1]], [0.0, 1.0], [True, False]],
    ids=str,
)
def test_rows_that_are_none(rows):
    rows = mx.array(rows) if rows else mx.zeros((0,), mx.int32)
    with pytest.raises(ValueError, match=r"rows: got \[.*\], expected one or more .* of 10"):
        check_row_indices(rows, 10)


@pytest.mark.parametrize("rows", [[0], [9], [1, 4, 5], list(range(10))], ids=str)
def test_rows_that_are_some(rows):
    check_row_indices(mx.array(rows), 10)
    check_row_indices(mx.array(rows, mx.uint32), 10)


@pytest.mark.parametrize("rows", [[0], [1, 4, 5], list(range(6))], ids=str)
def test_rows_are_taken_and_put_back_bit_for_bit(rows):
    whole, part = mx.random.normal((2, 3, 4)), mx.random.normal((1, len(rows), 4))
    (taken,), (put,) = mx.vjp(lambda x: rows_of(x, mx.array(rows)), [whole], [part])
    assert np.array_equal(taken[0], np.array(whole).reshape(6, 4)[rows])
    expected = np.zeros((6, 4), np.float32)
    expected[rows] = np.array(part[0])
    assert np.array_equal(np.array(put).reshape(6, 4), expected)


def test_all_rows_are_no_copy(memory):
    whole = mx.zeros((2, 512, 256))
    mx.eval(whole)
    before = mx.get_active_memory()
    taken = rows_of(whole, mx.arange(1024))
    (back,) = mx.vjp(lambda x: rows_of(x, mx.arange(1024)), [whole], [taken])[1]
    mx.eval(taken, back)
    assert mx.get_active_memory() - before < whole.nbytes // 8
