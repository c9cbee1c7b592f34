"""Nearest tokens against a ranking of the whole similarity matrix, and what finding them holds."""

import mlx.core as mx
import numpy as np
import pytest
from backends import frees_at_once
from harness import engine, save
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.losses.head import Adapter, MatrixHead
from mlx_edgelora.losses.neighbours import nearest, row_sum

MIB = 2**20


def similarities(weight, tokens):
    """Cosines in float64 [n, vocabulary]; a token to itself infinite, a zero row to all zero."""
    weight = np.array(weight, np.float64)
    lengths = np.linalg.norm(weight, axis=1, keepdims=True)
    unit = weight / np.where(lengths, lengths, 1)
    alike = unit[tokens] @ unit.T
    alike[np.arange(len(tokens)), tokens] = np.inf
    return alike


def check(got, weight, tokens, k, tolerance=1e-6):
    """The k largest similarities, in order, of k different tokens; ties may go either way."""
    assert (got.shape, got.dtype) == ((len(tokens), k), mx.int32)
    got, alike = np.array(got), similarities(weight, tokens)
    assert np.array_equal(got[:, 0], tokens)
    assert all(len(set(row)) == k for row in got.tolist())
    mine = np.take_along_axis(alike, got, axis=1)
    best = -np.sort(-alike, axis=1)[:, :k]
    assert np.abs(mine[:, 1:] - best[:, 1:]).max(initial=0) <= tolerance


@st.composite
def cases(draw):
    """Small whole numbers: twins, opposite rows and zero rows are common."""
    vocabulary, width = draw(st.integers(1, 50)), draw(st.integers(1, 4))
    rng = np.random.RandomState(draw(st.integers(0, 10_000)))
    weight = rng.randint(-2, 3, (vocabulary, width))
    tokens = rng.randint(0, vocabulary, draw(st.integers(1, 9)))
    return weight, tokens, draw(st.integers(1, vocabulary))


@settings(max_examples=120, deadline=None)
@given(case=cases(), tile_bytes=st.integers(1, 3000))
def test_nearest_are_those_of_the_whole_matrix(case, tile_bytes):
    weight, tokens, k = case
    head = MatrixHead(mx.array(weight, mx.float32))
    check(nearest(head, mx.array(tokens), k, tile_bytes), weight, tokens, k)


@pytest.mark.parametrize("k", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("rows", [1001, 1000, 333, 10])
def test_the_very_same_tokens_where_no_two_are_alike(k, rows):
    """In tiles of `rows`, the last one short."""
    weight = mx.random.normal((1001, 64))
    tokens = np.array([0, 1000, 17, 500, 999])
    got = nearest(MatrixHead(weight), mx.array(tokens), k, 4 * 64 * rows)
    expected = np.argsort(-similarities(weight, tokens), axis=1, kind="stable")[:, :k]
    # Cosines closer than float32 tells apart change places; there are few.
    assert (np.array(got) == expected).mean() > 0.99
    check(got, weight, tokens, k)


def test_twins_and_zero_rows():
    """A token is nearest to itself even where twins come before it; nothing is like zero."""
    weight = np.zeros((9, 3))
    weight[[1, 4, 7]] = [3, 0, 4]
    weight[2], weight[5] = [-3, 0, -4], [3, 1, 4]
    for tile_bytes in (1, 30, 10**6):
        got = np.array(
            nearest(MatrixHead(mx.array(weight, mx.float32)), mx.array([7, 0, 8]), 9, tile_bytes)
        )
        assert got[0, 0] == 7
        assert set(got[0, 1:3].tolist()) == {1, 4}
        assert got[0, 3] == 5
        assert got[0, -1] == 2
        assert got[1, 0] == 0
        assert got[2, 0] == 8
        assert [sorted(row) for row in got.tolist()] == [list(range(9))] * 3


def test_length_scale_and_bias_do_not_matter():
    weight, tokens = mx.random.normal((60, 8)), mx.arange(0, 60, 7)
    expected = nearest(MatrixHead(weight), tokens, 9)
    lengths = 10 ** mx.random.uniform(-6, 6, (60, 1))
    bias = 100 * mx.random.normal((60,))
    adapter = Adapter(mx.ones((2, 8)), mx.random.normal((60, 2)), 9.0)
    other = MatrixHead(weight * lengths, bias, logits_transform=mx.tanh, adapter=adapter)
    assert mx.array_equal(nearest(other, tokens, 9), expected).item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_rows_are_compared_in_float32(dtype):
    weight = mx.random.normal((300, 32)).astype(dtype)
    tokens = np.arange(0, 300, 11)
    got = nearest(MatrixHead(weight), mx.array(tokens), 20, 4000)
    check(got, np.array(weight.astype(mx.float32)), tokens, 20)


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_heads(name, streamed, tmp_path):
    """The rows as they are multiplied, from memory and from disk."""
    ours = engine(save(tmp_path, name, quantized=True), streamed=streamed)
    tokens = np.array([100, 0, 57, 57])
    weight = ours.head.unpack(ours.head.slice(0, 101)).weight
    check(nearest(ours.head, mx.array(tokens), 30, 8000), weight, tokens, 30)
    ours.close()


@pytest.mark.parametrize("k", [0, -1, 22])
def test_k_that_does_not_fit(k):
    head = MatrixHead(mx.ones((21, 4)))
    with pytest.raises(ValueError, match=rf"^k: got {k}, expected 1 to 21, the vocabulary of"):
        nearest(head, mx.array([1]), k)


@pytest.mark.parametrize("tokens", [[], [-1, 3], [3, 21]])
def test_tokens_that_do_not_fit(tokens):
    head = MatrixHead(mx.ones((21, 4)))
    with pytest.raises(ValueError, match=r"^tokens: got \[.*\], expected some from 0 to 20"):
        nearest(head, mx.array(tokens, mx.int32), 3)


# --- the sum of rows ----------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tile_bytes", [1, 800, 10**7])
def test_sum_of_rows(tile_bytes, biased):
    weight, bias = mx.random.normal((1003, 16)), mx.random.normal((1003,))
    total = row_sum(MatrixHead(weight, bias if biased else None), tile_bytes)
    assert (total.weight.shape, total.weight.dtype) == ((1, 16), mx.float32)
    expected = np.array(weight, np.float64).sum(axis=0)
    assert np.abs(np.array(total.weight[0]) - expected).max() < 1e-3
    if biased:
        assert total.bias.item() == pytest.approx(np.array(bias, np.float64).sum(), abs=1e-3)
    else:
        assert total.bias is None


# --- memory -------------------------------------------------------------------------------


class Read(MatrixHead):
    """A head whose rows are new arrays, as those from a disk are."""

    def slice(self, start, stop):
        rows = {n: mx.array(np.array(a)) for n, a in super().slice(start, stop).items()}
        mx.eval(rows)
        return rows


def above(function):
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    function()
    return mx.get_peak_memory() - before


@frees_at_once
@pytest.mark.parametrize("k", [10, 300])
@pytest.mark.parametrize("budget", [MIB // 4, MIB])
def test_nothing_of_tokens_x_vocabulary_exists(memory, k, budget):
    """All similarities of these 128 tokens would be 16 MiB, the rows in float32 2 MiB."""
    weight, tokens = mx.random.normal((32_768, 16)).astype(mx.float16), mx.arange(0, 1280, 10)
    mx.eval(weight, tokens)
    head = Read(weight)
    assert above(lambda: nearest(head, tokens, k, budget)) < 3.5 * budget + 32 * 128 * k

    def whole():
        rows = weight.astype(mx.float32)
        mx.eval(mx.argpartition(-(rows[tokens] @ rows.T), k, axis=1)[:, :k])

    assert above(whole) > 16 * MIB


@frees_at_once
def test_the_sum_reads_by_tiles(memory):
    weight = mx.random.normal((32_768, 64)).astype(mx.float16)
    mx.eval(weight)  # 4 MiB
    assert above(lambda: row_sum(Read(weight), MIB // 2)) < MIB
