"""Sliding windows in a walk: the same gradients, no tokens x tokens, no hidden tiles."""

import gc
from functools import partial

import mlx.core as mx
import pytest
from architectures import CONFIGS
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    save,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import base
from pairwise import pairwise

from mlx_edgelora.blocks import attention
from mlx_edgelora.blocks.attention import attend_bounded, replace_attention
from mlx_edgelora.engine import walk
from mlx_edgelora.engine.whole_block import WholeBlock
from mlx_edgelora.layers import attention as layer
from mlx_edgelora.layers import grid

MAKER, ATTENTION = base.create_causal_mask, base.scaled_dot_product_attention
WINDOWED = [name for name, changes in CONFIGS.items() if "sliding_window" in changes]
MIB = 2**20
TOKENS = 17


@pytest.fixture(autouse=True)
def undone():
    yield
    assert base.create_causal_mask is MAKER
    assert base.scaled_dot_product_attention is ATTENTION


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Attention in tiles of a few scores, where a test's few tokens would be one tile."""
    monkeypatch.setattr(attention, "TILE_BYTES", 0)
    tiled = partial(layer.tiled_attention, tile_bytes=150)
    monkeypatch.setattr(attention, "tiled_attention", tiled)


def test_there_are_architectures_with_windows():
    assert {"gemma3_text", "ministral3", "cohere2", "gpt_oss"} <= set(WINDOWED)


def assert_gradients_of_mlx_lm(folder, batch, **way):
    expected_loss, expected = plain_value_and_grad(plain(folder), batch)
    ours = engine(folder, **way)
    (loss, _), got = ours.value_and_grad(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)
    ours.close()


@pytest.mark.parametrize(
    ("name", "way", "batch"),
    pairwise(
        WINDOWED,
        [{}, {"tile_tokens": 8}, {"tile_tokens": 64}],
        [{}, {"rows": 1, "tokens": 13}, {"share": 2.0}],
    ),
    ids=str,
)
def test_gradients_in_tiles_of_attention_equal_mlx_lm(name, way, batch, tmp_path, tiny_tiles):
    folder = save(tmp_path, name, True)
    assert_gradients_of_mlx_lm(folder, random_batch(**batch), **way)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint for each architecture and window, made once."""
    made = {}

    def folder(name, window):
        if (name, window) not in made:
            made[name, window] = tmp_path_factory.mktemp(f"{name}{window}")
            save(made[name, window], name, True, sliding_window=window)
        return made[name, window]

    return folder


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(WINDOWED),
    window=st.integers(2, 12),  # of one token's softmax there is no gradient
    rows=st.integers(1, 2),
    tokens=st.integers(7, 24),
    tile_tokens=st.none() | st.integers(3, 20),
    share=st.sampled_from([0.15, 0.5, 2.0]),
    tile_bytes=st.integers(4, 600),
)
def test_any_window_and_tiles(folders, name, window, rows, tokens, tile_tokens, share, tile_bytes):
    batch = random_batch(rows, tokens, share=share, seed=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE_BYTES", 0)
        tiled = partial(layer.tiled_attention, tile_bytes=tile_bytes)
        patch.setattr(attention, "tiled_attention", tiled)
        assert_gradients_of_mlx_lm(folders(name, window), batch, tile_tokens=tile_tokens)


@pytest.mark.slow
def test_a_compiled_walk_knows_the_window(tmp_path, tiny_tiles, compiles):
    """Arrays are inputs of a compiled function, and evaluated: a mask must not be one."""
    evaluated = []
    plain_compile = mx.compile

    def watching(function):
        compiled = plain_compile(function)

        def call(*args):
            if not isinstance(args[0], dict):  # no function of a block
                return compiled(*args)
            masks = [x for x in args if isinstance(x, tuple | dict)]
            arrays = [value for _, value in tree_flatten(masks) if isinstance(value, mx.array)]
            evaluated.append([x.shape for x in arrays if x.shape[-2:] == (TOKENS, TOKENS)])
            return compiled(*args)

        return call

    # One window and one without a word to say: a third block would be the first again.
    folder = save(tmp_path, "gemma3_text", True, num_hidden_layers=2)
    batch = random_batch(tokens=TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "compile", watching)
        assert_gradients_of_mlx_lm(folder, batch, compiled=True)
    assert len(evaluated) == 4  # forward and backward of two blocks
    assert not any(evaluated)


def peak_of_a_step(folder, tokens, **way):
    """Above what the weights take."""
    ours = engine(folder, streamed=False, **way)
    batch = random_batch(1, tokens, share=0.5)  # scattered: a mask of n x T, too
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    ours.value_and_grad(batch)
    ours.close()
    return mx.get_peak_memory() - before


def growth(folder, window, **way):
    """How much more a step of 4096 tokens takes than one of 2048."""
    folder = folder / str(window)
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    save(folder, "ministral3", False, sliding_window=window, **shape)
    return peak_of_a_step(folder, 4096, **way) - peak_of_a_step(folder, 2048, **way)


WAYS = pytest.mark.parametrize("way", [{}, {"tile_tokens": 512}], ids=str)


@pytest.mark.slow
@WAYS
def test_a_window_costs_no_tokens_by_tokens(way, tmp_path, memory):
    """An array of T x T bytes would grow by 12 MiB."""
    assert growth(tmp_path, 64, **way) < growth(tmp_path, 100_000, **way) + 2 * MIB


@pytest.mark.slow
@WAYS
def test_a_mask_that_knows_nothing_costs_them(way, tmp_path, memory, monkeypatch):
    """What the test above measures with mlx-lm's masks as they are."""
    monkeypatch.setattr(walk, "bounded_attention", lambda: replace_attention(attend_bounded))
    assert growth(tmp_path, 64, **way) > growth(tmp_path, 100_000, **way) + 8 * MIB


def tiles_of_a_step(folder, tokens, monkeypatch, **way):
    """The tiles of scores that a step computes, forward and backward."""
    seen = []
    scores = grid.Grid.scores

    def counting(self, queries, unit, rows, keys, after):
        at = self.positions[rows[0]], self.positions[rows[1] - 1]
        seen.append((at, keys, self.band))
        return scores(self, queries, unit, rows, keys, after)

    with monkeypatch.context() as patch:
        patch.setattr(grid.Grid, "scores", counting)
        ours = engine(folder, **way)
        ours.value_and_grad(random_batch(1, tokens, share=2.0))
        ours.close()
    return seen


@pytest.mark.parametrize("way", [{}, {"tile_tokens": 16}], ids=str)
def test_tiles_a_window_hides_are_not_computed(way, tmp_path, monkeypatch, tiny_tiles):
    """Two blocks of the same sizes, one with a window."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    folder = save(tmp_path, "ministral3", True, sliding_window=6, **kinds)
    counts = {}
    for tokens in (48, 96):
        seen = tiles_of_a_step(folder, tokens, monkeypatch, **way)
        for (first, last), keys, band in seen:
            assert band is None or keys[0] <= last
            assert band is None or band.window is None or keys[1] > first - band.window + 1
        counts[tokens] = sum(band is not None and band.window == 6 for *_, band in seen), len(seen)
    (windowed, every), (windowed_twice, every_twice) = counts.values()
    # Along the diagonal with a window; half of all without.
    assert windowed_twice < 2.3 * windowed
    assert every_twice - windowed_twice > 2.9 * (every - windowed)
    assert windowed_twice < 0.4 * (every_twice - windowed_twice)


def test_tiles_of_tokens_ask_for_no_more_keys_than_a_window_shows(tmp_path, monkeypatch):
    """Nor for an array of a mask, labels here and there or not."""
    calls = []

    def recording(q, k, v, *, mask, **options):
        assert not isinstance(mask, mx.array)
        if isinstance(mask, layer.Band) and mask.window:
            calls.append((q.shape[2], k.shape[2]))
        return layer.tiled_attention(q, k, v, mask=mask, **options)

    monkeypatch.setattr(attention, "TILE_BYTES", 0)
    monkeypatch.setattr(attention, "tiled_attention", recording)
    folder = save(tmp_path, "ministral3", True, sliding_window=6)
    ours = engine(folder, tile_tokens=16)
    assert ours.walk.tiling == "16 tokens at a time in 3 of 3 blocks"
    calls.clear()  # those of the trials
    for share in (2.0, 0.3):  # all labels, then some: of the last block for these alone
        ours.value_and_grad(random_batch(1, 96, share=share))
    ours.close()
    # 6 tiles of each of two blocks, forward and again in the backward, in two steps: each sees
    # itself and of the one before what the window shows.
    assert len(calls) == 2 * 2 * 2 * 6
    assert {keys for _, keys in calls} == {16, 16 + 6 - 1}
    assert {queries for queries, _ in calls} == {16}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_masks_are_mlx_lms_again_after_a_step_and_after_an_error(error, tmp_path, monkeypatch):
    ours = engine(save(tmp_path, "gpt_oss", True))
    batch = random_batch()
    ours.value_and_grad(batch)
    assert base.create_causal_mask is MAKER

    def failing(*_):
        assert base.create_causal_mask is not MAKER
        raise error

    monkeypatch.setattr(WholeBlock, "backward", failing)
    with pytest.raises(error):
        ours.value_and_grad(batch)
    assert base.create_causal_mask is MAKER
    ours.close()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "ministral3"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_run_of_labels_that_ends_inside_a_tile_where_attention_is_fused(
    name, rows, tmp_path, monkeypatch
):
    """MLX then gives gradients of fewer keys than the tile has; a window begins inside one."""

    def fused(q, k, v, *, traced, mask=None, sinks=None):
        return not isinstance(mask, layer.Band) and sinks is None, "as if"

    monkeypatch.setattr(attention, "use_fused", fused)
    monkeypatch.setattr(attention, "TILE_BYTES", 0)  # nothing is small
    batch = random_batch(rows, 17)
    batch.mask[:] = False
    batch.mask[:, 3:9] = True
    folder = save(tmp_path, name, True)
    assert_gradients_of_mlx_lm(folder, batch, tile_tokens=5 * rows)
    batch.mask[:, 4:9] = False  # one token sees its window whole: no mask at all
    batch.mask[:, 12] = True
    assert_gradients_of_mlx_lm(folder, batch, tile_tokens=5 * rows)
