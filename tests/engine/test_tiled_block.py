"""Blocks by tiles of tokens: the same gradients, nothing of tokens x hidden."""

from contextlib import closing, nullcontext

import mlx.core as mx
import numpy as np
import pytest
from architectures import CONFIGS, EACH_KIND, add_lora, build, quantizable
from backends import frees_at_once
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import nn
from peaks import ROUNDS, above, begin, growth, held, lowest
from tf32 import tf32

from mlx_edgelora.blocks.block_list import BlockList, array_slots, bind_arrays
from mlx_edgelora.blocks.gated_mlp import find_gated_mlp, slice_mlps
from mlx_edgelora.blocks.masks import simplest_mask
from mlx_edgelora.blocks.parts import TokenSpan, mask_at, visible_keys
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.engine import key_windows
from mlx_edgelora.engine.hidden import Hidden, Slots, spans_of
from mlx_edgelora.engine.wanted import WantedRows
from mlx_edgelora.layers.grid import _Added
from mlx_edgelora.measure.profile import recording
from mlx_edgelora.model.weights import ResidentWeights
from mlx_edgelora.storage.stores import RamStore

# How many of three blocks can be computed by tiles, for some of a tile's tokens alone, and hold
# a gated MLP.
EVERY = [
    pytest.param(name, marks=() if name in EACH_KIND else pytest.mark.slow) for name in CONFIGS
]
KINDS = {name: (3, 3, 3) for name in CONFIGS} | {
    "gemma2": (3, 0, 3),  # its own attention: cut at its cache
    "phi3": (3, 3, 0),  # gate and up in one matrix
    "qwen3_moe": (3, 3, 1),
    "qwen3_next": (3, 1, 3),  # linear attention in the others: all tokens
    "gpt_oss": (3, 3, 0),
    "deepseek_v3": (3, 0, 3),  # cut at its cache
    "olmo_hybrid": (3, 1, 3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_tiled(name):
    """A silent step back to whole blocks would cost memory and no test of gradients sees it."""
    model = build(name)
    nn.quantize(model, **quantizable())
    add_lora(model)
    blocks = BlockList(model)
    tiling = Tiling(blocks, [ResidentWeights()])
    choices = [tiling.tileable(index) for index in range(3)]
    tileable, by_rows, gated = KINDS[name]
    assert sum(choice.possible for choice in choices) == tileable
    assert sum(choice.by_rows for choice in choices) == by_rows
    for index, block in enumerate(blocks.blocks):
        assert bool(choices[index].possible) != bool(choices[index].reason), block
    lora = sum(type(m).__module__.startswith("mlx_lm") for b in blocks.blocks for m in b.modules())
    assert lora
    if gated:
        model = build(name)
        model.freeze()  # as a run does; trained matrices are not sliced
        assert slice_mlps(BlockList(model)).startswith(f"{gated} gated MLPs")


@pytest.mark.parametrize("name", EVERY)
def test_products_in_fewer_bits_do_not_look_like_other_tokens(name):
    """Of the whole trial, whose tiles are so short that a GPU multiplies them in all bits."""
    model = build(name)
    nn.quantize(model, **quantizable())
    add_lora(model)
    with tf32(least=4):
        tiling = Tiling(BlockList(model), [ResidentWeights()])
        choices = [tiling.tileable(index) for index in range(3)]
    found = [sum(getattr(choice, kind) for choice in choices) for kind in ("possible", "by_rows")]
    assert tuple(found) == KINDS[name][:2]


@pytest.mark.parametrize("name", EVERY)
def test_tiles_of_tokens_and_slices_of_the_mlp_beside_them(name, tmp_path):
    folder = save(tmp_path, name, True)
    batches = [random_batch(), random_batch(1, 13, seed=1, share=2.0)]
    reference = plain(folder)
    with closing(engine(folder, tile_tokens=8, mlp_bytes=20_000, prefetch=False)) as ours:
        for batch in batches:
            expected_loss, expected = plain_value_and_grad(reference, batch)
            (loss, _), got = ours.value_and_grad(batch)
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert ours.loss(batch)[0].item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected, resolution=resolution(reference, batch))


TILEABLE = [name for name in CONFIGS if KINDS[name][0]]


@pytest.mark.parametrize("name", [p for p in EVERY if p.values[0] in TILEABLE])
def test_gradients_of_keys_and_values_are_added_where_attention_makes_them(
    name, tmp_path, monkeypatch
):
    """As in rows of thousands of tokens: attention in its own tiles, of grouped heads, windows."""
    monkeypatch.setattr("mlx_edgelora.blocks.attention.TILE_BYTES", 0)
    monkeypatch.setattr("mlx_edgelora.layers.attention.TILE_BYTES", 1500)
    added = []
    monkeypatch.setattr("mlx_edgelora.layers.key_sums.PIECE", 8)
    monkeypatch.setattr("mlx_edgelora.layers.grid.PIECE", 8)
    original = _Added.add
    monkeypatch.setattr(_Added, "add", lambda *args: added.append(1) or original(*args))
    folder, batch = save(tmp_path, name, True), random_batch(2, 23)
    reference = plain(folder)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=10)) as ours:
        through_cache = ours.walk.tile_choice(0, 23).through_cache
        _, got = ours.value_and_grad(batch)
    assert bool(added) == (not through_cache)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


@pytest.mark.parametrize("key_tokens", [1, 7, 12])
@pytest.mark.parametrize("name", [p for p in EVERY if p.values[0] in TILEABLE])
def test_gradients_of_keys_and_values_of_some_tokens_at_a_time(
    name, key_tokens, tmp_path, monkeypatch
):
    """Tiles are computed for the tokens of a window, and again for those before it."""
    monkeypatch.setattr("mlx_edgelora.blocks.attention.TILE_BYTES", 0)
    monkeypatch.setattr("mlx_edgelora.layers.attention.TILE_BYTES", 1500)
    monkeypatch.setattr("mlx_edgelora.layers.key_sums.PIECE", 8)
    monkeypatch.setattr("mlx_edgelora.layers.grid.PIECE", 8)
    again = []
    original = key_windows.add_to_keys
    monkeypatch.setattr(
        key_windows, "add_to_keys", lambda *args: again.append(1) or original(*args)
    )
    folder, batch = save(tmp_path, name, True), random_batch(2, 23)
    reference = plain(folder)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, tile_tokens=10, key_tokens=key_tokens)) as ours:
        tiles = ours.walk.tile_choice(0, 23)
        _, got = ours.value_and_grad(batch)
        assert not ours.walk.store._kept  # nothing waits in the file
    assert bool(again) == (not tiles.through_cache)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


def test_the_gradient_of_wanted_rows_waits_in_the_store():
    """So that it does not grow the memory of a longer row."""
    rows, spans = [1, 5, 8, 13], spans_of(7, 3)  # of two rows of 7 tokens
    wanted, whole = WantedRows(mx.array(rows), spans), mx.random.normal((1, len(rows), 8))
    dy = Hidden(whole)
    stored = wanted.by_tiles(dy, Slots(RamStore(), 0, 0))
    assert dy._array is None
    found = [wanted.cotangent(stored, number) for number in range(len(spans))]
    # Tokens 0 to 2, 3 to 5 and the last one of each row.
    assert mx.array_equal(found[0], whole[:, [0, 2]])
    assert mx.array_equal(found[1], whole[:, [1]]) and mx.array_equal(found[2], whole[:, [3]])
    assert wanted.cotangent(stored, 0) is not None
    none = WantedRows(mx.array(rows[:1]), spans)
    assert none.cotangent(none.by_tiles(Hidden(whole[:, :1]), Slots(RamStore(), 0, 0)), 1) is None


@frees_at_once
def test_waiting_rows_are_not_in_memory(memory, spill):
    tokens, width = 2048, 256
    spans = [TokenSpan(start, start + 128) for start in range(0, tokens, 128)]
    whole = mx.random.normal((1, tokens // 2, width))
    mx.eval(whole)
    size, before = whole.nbytes, mx.get_active_memory()
    dy = Hidden(whole)
    del whole
    wanted = WantedRows(mx.arange(0, tokens, 2), spans)
    stored = wanted.by_tiles(dy, Slots(spill, 0, 0))
    assert mx.get_active_memory() < before - 0.9 * size
    mx.reset_peak_memory()
    for number in range(len(spans)):
        mx.eval(wanted.cotangent(stored, number) + 0)
    assert mx.get_peak_memory() < before - 0.5 * size  # a few tiles of 16


def test_the_wanted_rows_of_the_last_block_wait_in_the_store_as_well():
    spans, store = spans_of(7, 3), RamStore()
    rows = [1, 5, 8, 9, 13]  # of two rows of 7 tokens; none of the second tile of the second row
    wanted, x = WantedRows(mx.array(rows), spans), mx.random.normal((2, 7, 4))
    out = Hidden.tiles(spans, Slots(store, 0, 0))
    for number, span in enumerate(spans):
        tile = x[:, span.start : span.stop].reshape(1, -1, 4)
        out.put(number, tile[:, wanted.at(number)])
    assert mx.array_equal(wanted.joined(out).whole()[0], x.reshape(-1, 4)[mx.array(rows)])
    assert not store._arrays


@pytest.mark.slow
def test_gradients_of_all_keys_are_held_once(tmp_path, memory, monkeypatch):
    """Keys, values and their sums, and of what a tile adds to these only a piece at a time."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}
    folder, tokens = save(tmp_path, "llama", False, **shape), 2048
    keys_and_values = 4 * tokens * 2 * 8 * 128

    def taken(below=0.0):
        with closing(engine(folder, prefetch=False, tile_tokens=128)) as ours:
            batch = random_batch(1, tokens, share=0.05)
            ours.value_and_grad(random_batch(1, 129))  # tries what can be tiled
            return lowest(lambda: backward_peak(ours, batch), below)

    with monkeypatch.context() as patch:
        patch.setattr("mlx_edgelora.engine.tiled_backward.add_key_gradients", nullcontext)
        twice = taken()
    bound = twice - keys_and_values
    assert taken(bound) < bound


@pytest.mark.slow
def test_gradients_of_some_keys_take_less_than_those_of_all(tmp_path, memory, monkeypatch):
    """What tiles leave for earlier keys waits in the file."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}
    folder, tokens, window = save(tmp_path, "llama", False, **shape), 1024, 256
    for module in ("grid", "key_sums"):
        monkeypatch.setattr(f"mlx_edgelora.layers.{module}.PIECE", 128)
    # What MLX allocates ahead is small then.
    monkeypatch.setattr("mlx_edgelora.blocks.attention.TILE_BYTES", 2**16)
    monkeypatch.setattr("mlx_edgelora.layers.attention.TILE_BYTES", 2**16)

    def taken(key_tokens, below=0.0):
        plan = {"prefetch": False, "tile_tokens": 128, "key_tokens": key_tokens}
        with closing(engine(folder, **plan)) as ours:
            batch = random_batch(1, tokens, share=0.05)
            ours.value_and_grad(random_batch(1, 129))  # tries what can be tiled
            return lowest(lambda: backward_peak(ours, batch), below)

    # But for the queries and the gradient that a tile leaves, and those that are read again.
    saved = 4 * (tokens - window) * 2 * 8 * 128
    bound = taken(None) - 0.5 * saved
    assert taken(window, bound) < bound


def test_frequencies_that_change_behind_some_length(tmp_path):
    """They are those of the whole text, which a tile does not know."""
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 9}
    folder, batch = save(tmp_path, "llama", True, **scaling), random_batch(tokens=19)
    _, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, tile_tokens=5)) as ours:
        assert not any(ours.walk.tile_choice(index, 19).possible for index in range(3))
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected)


def test_lower_blocks_and_an_embedding_that_is_trained(tmp_path):
    folder = save(tmp_path, "llama", True)
    batch = random_batch(tokens=19)
    for lora in ({"num_layers": 2}, {"keys": ["model.embed_tokens", "self_attn.q_proj"]}):
        _, expected = plain_value_and_grad(plain(folder, **lora), batch)
        with closing(engine(folder, tile_tokens=7, **lora)) as ours:
            _, got = ours.value_and_grad(batch)
        assert_same_gradients(got, expected)


@pytest.mark.parametrize("tile_tokens", [None, 30])
@pytest.mark.parametrize("num_layers", [-1, 2])
def test_after_a_backward_nothing_waits_in_memory(num_layers, tile_tokens, tmp_path):
    folder, batch = save(tmp_path, "llama", True), random_batch(tokens=57)
    options = {"tile_tokens": tile_tokens, "num_layers": num_layers, "spilled": False}
    half_an_input = 4 * 57 * 64  # of a block; what is read ahead varies by less
    with closing(engine(folder, **options)) as ours:
        ours.value_and_grad(random_batch(tokens=2))
        before = held()
        ours.backward(batch, lambda gradients: None)
        assert held() < before + half_an_input
        ours.loss(batch)
        assert held() < before + half_an_input


def test_dropout_computes_blocks_whole_and_with_one_mask(tmp_path):
    folder = save(tmp_path, "llama", True)
    batch, gradients = random_batch(), []
    for tile_tokens in (None, 5):
        with closing(engine(folder, tile_tokens=tile_tokens, dropout=0.4)) as ours:
            mx.random.seed(3)
            gradients.append(ours.value_and_grad(batch)[1])
    assert_same_gradients(gradients[1], gradients[0], 1e-6)


@given(tokens=st.integers(1, 5000), size=st.integers(1, 5000))
def test_tiles_are_of_nearly_one_length(tokens, size):
    spans = spans_of(tokens, size)
    lengths = [span.stop - span.start for span in spans]
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == tokens
    assert min(lengths) >= 1 and max(lengths) <= size
    assert len(spans) == -(-tokens // max(lengths)) <= -(-tokens // size)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 12),
    span=st.tuples(st.integers(0, 11), st.integers(1, 12)),
    window=st.none() | st.integers(1, 14),
    more=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_masks_of_tiles_are_those_of_the_whole(tokens, span, window, more):
    """Over the keys that are seen, and over more of them."""
    start, stop = min(span[0], tokens - 1), min(max(span[0] + 1, span[1]), tokens)
    span, mask = TokenSpan(start, stop), simplest_mask(range(tokens), tokens, window)
    ago = np.arange(tokens)[:, None] - np.arange(tokens)
    whole = (ago >= 0) & (ago < (window or tokens))
    if mask is None:  # a single token
        assert whole.all()
        return
    seen = visible_keys(mask, span, tokens)
    for keys in (seen, TokenSpan(max(0, seen.start - more[0]), min(tokens, seen.stop + more[1]))):
        expected = whole[span.start : span.stop, keys.start : keys.stop]
        assert expected.sum() == whole[span.start : span.stop].sum()  # nothing that is seen is lost
        for every in (mask, mx.array(whole)):  # one that knows what it says, and one that does not
            part, got = mask_at(every, span, keys), np.ones_like(expected)
            if isinstance(part, str):  # the last query sees the last key
                count, across = expected.shape
                got = np.arange(across) <= np.arange(across - count, across)[:, None]
            elif part is not None:
                got = np.array(part)
            assert (got == expected).all()


def test_an_activation_that_looks_across_features_is_left_alone():
    class MLP(nn.Module):
        def __init__(self, across):
            super().__init__()
            self.w1, self.w3 = nn.Linear(8, 16), nn.Linear(8, 16)
            self.w2 = nn.Linear(16, 8)
            self.across = across

        def __call__(self, x):
            gate = self.w1(x)
            gate = mx.softmax(gate, axis=-1) if self.across else nn.silu(gate)
            return self.w2(gate * self.w3(x))

    class Residual(MLP):
        def __call__(self, x):
            return x + super().__call__(x)

    assert find_gated_mlp(MLP(False)).down == "w2"
    assert find_gated_mlp(MLP(True)) is None
    assert find_gated_mlp(Residual(False)) is None


def backward_peak(ours, batch):
    begin()
    with recording() as profile:
        ours.value_and_grad(batch)
    return max(s.peak_bytes for s in profile.entries if s.phase in ("recompute", "backward"))


@pytest.mark.slow
def test_nothing_of_tokens_by_hidden_is_held(tmp_path, memory):
    """Of the whole length only keys and values, and sums of their gradients, are in memory."""
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 3}
    folder = save(tmp_path, "qwen3", True, **shape)
    short, long = 512, 1536
    one = 4 * (long - short) * 512
    keys_and_values = 4 * (long - short) * 2 * 32
    bound = 0.5 * one + keys_and_values

    def grown(rounds=1, **options):
        with closing(engine(folder, prefetch=False, **options)) as ours:
            few, many = (random_batch(1, tokens, share=0.05) for tokens in (short, long))
            ours.value_and_grad(few)  # the first one also tries what can be tiled
            return growth(
                lambda: backward_peak(ours, few), lambda: backward_peak(ours, many), bound, rounds
            )

    assert grown(ROUNDS, tile_tokens=64) < bound
    # The same measurement, far beyond the bound: tiles kept in memory, and whole blocks.
    assert grown(tile_tokens=64, spilled=False) > one
    assert grown(tile_tokens=None) > 4 * one


def holding(tiling, index):
    """In place of `Tiling._computing`: the block's arrays have memory of their own."""
    slots, arrays = array_slots(tiling._blocks.blocks[index]), {}
    for source in tiling._weights:
        arrays |= {name: value + 0 for name, value in source.block(index).items()}
    mx.eval(arrays)

    def compute(function, *args):
        with bind_arrays(slots, arrays):
            made = function(*args)
        mx.eval(made)
        return made

    return compute


@pytest.mark.slow
def test_a_trial_does_not_hold_a_second_block(tmp_path, memory, monkeypatch):
    """Beside the memory that weights are read into; that would be the peak of a first step."""
    wide = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1}
    wide |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    folder = save(tmp_path, "llama", True, **wide)
    with closing(engine(folder, tile_tokens=64, mlp_bytes=2**20)) as ours:
        walk = ours.walk
        block = sum(array.nbytes for array in walk.weights.block(0).values())

        def trial():
            walk._tiling._found.clear()
            assert walk._tiling.tileable(0).by_rows

        assert lowest(lambda: above(trial), block) < block
        monkeypatch.setattr(Tiling, "_computing", holding)
        assert above(trial) > 1.3 * block
