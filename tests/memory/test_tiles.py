"""Blocks by tiles of tokens: the same gradients, one array of tokens x hidden."""

from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from architectures import CONFIGS, add_lora, build, quantizable
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
from peaks import ROUNDS, above, begin, growth, lowest

from mlx_edgelora.layers.order import Stops
from mlx_edgelora.memory.profile import recording
from mlx_edgelora.memory.streams import KeySums
from mlx_edgelora.memory.tiles import TiledBlock
from mlx_edgelora.model.blocks import BlockList
from mlx_edgelora.model.mlp import gated_form, slice_mlps
from mlx_edgelora.model.parts import Picked, Span, mask_at
from mlx_edgelora.model.sources import ResidentWeights
from mlx_edgelora.model.tiling import Tiling
from mlx_edgelora.model.trial import trial_of

BRANCHES = ("self_attn", "mlp")
# How many of three blocks can be computed by tiles, in halves, and hold a gated MLP.
KINDS = {name: (3, 3, 3) for name in CONFIGS} | {
    "phi3": (3, 3, 0),  # gate and up in one matrix
    "cohere2": (3, 0, 3),  # attention and MLP beside each other
    "qwen3_moe": (3, 3, 1),
    "qwen3_next": (1, 1, 3),  # linear attention in the others
    "gpt_oss": (3, 3, 0),
    "deepseek_v3": (3, 3, 3),
    "olmo_hybrid": (1, 1, 3),
}
WAYS = [
    {"tile_tokens": 5},
    {"tile_tokens": 5, "halves": True, "prefetch": False},
    {"tile_tokens": 64, "halves": True, "prefetch": False},
]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_tiled(name):
    """A silent step back to whole blocks would cost memory and no test of gradients sees it."""
    model = build(name)
    nn.quantize(model, **quantizable())
    add_lora(model)
    blocks = BlockList(model)
    tiling = Tiling(blocks, ResidentWeights())
    choices = [tiling.of(index) for index in range(3)]
    tileable, halves, gated = KINDS[name]
    assert sum(choice.possible for choice in choices) == tileable
    assert sum(choice.branches == BRANCHES for choice in choices) == halves
    for index, block in enumerate(blocks.blocks):
        assert bool(choices[index].possible) != bool(choices[index].reason), block
    lora = sum(type(m).__module__.startswith("mlx_lm") for b in blocks.blocks for m in b.modules())
    assert lora
    if gated:
        model = build(name)
        assert slice_mlps(BlockList(model)).startswith(f"{gated} gated MLPs")


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_mlx_lm(name, way, tmp_path):
    folder = save(tmp_path, name, True)
    batches = [random_batch(), random_batch(1, 13, seed=1), random_batch(share=2.0)]
    reference = plain(folder)
    with closing(engine(folder, **way)) as ours:
        slice_mlps(ours._walk.blocks, 20_000)
        for batch in batches:
            expected_loss, expected = plain_value_and_grad(reference, batch)
            (loss, _), got = ours.value_and_grad(batch)
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert ours.loss(batch)[0].item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected, resolution=resolution(reference, batch))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_frequencies_that_change_behind_some_length(way, tmp_path):
    """They are those of the whole text, which a tile does not know."""
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 9}
    folder, batch = save(tmp_path, "llama", True, **scaling), random_batch(tokens=19)
    _, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, **way)) as ours:
        assert not any(choice.possible for choice in ours.walk._tiled.choices())
        _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("halves", [False, True])
def test_lower_blocks_and_an_embedding_that_is_trained(halves, tmp_path):
    folder = save(tmp_path, "llama", True)
    batch = random_batch(tokens=19)
    for lora in ({"num_layers": 2}, {"keys": ["model.embed_tokens", "self_attn.q_proj"]}):
        _, expected = plain_value_and_grad(plain(folder, **lora), batch)
        with closing(engine(folder, tile_tokens=7, halves=halves, **lora)) as ours:
            _, got = ours.value_and_grad(batch)
        assert_same_gradients(got, expected)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("num_layers", [-1, 2])
def test_after_a_backward_nothing_waits_in_memory(halves, num_layers, tmp_path):
    folder = save(tmp_path, "llama", True)
    ours = engine(folder, tile_tokens=7, halves=halves, spilled=False, num_layers=num_layers)
    ours.value_and_grad(random_batch(tokens=19))
    assert not ours._walk.store._arrays
    ours.loss(random_batch(tokens=19))
    assert not ours._walk.store._arrays


def test_dropout_computes_blocks_whole_and_with_one_mask(tmp_path):
    folder = save(tmp_path, "llama", True)
    batch, gradients = random_batch(), []
    for tile_tokens in (None, 5):
        with closing(engine(folder, tile_tokens=tile_tokens, dropout=0.4)) as ours:
            mx.random.seed(3)
            gradients.append(ours.value_and_grad(batch)[1])
    assert_same_gradients(gradients[1], gradients[0], 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 12),
    keys=st.tuples(st.integers(0, 11), st.integers(1, 12)),
    picked=st.sets(st.integers(0, 11), min_size=1),
    span=st.booleans(),
)
def test_masks_of_places_are_those_of_the_whole(tokens, keys, picked, span):
    positions = np.array(sorted(p for p in picked if p < tokens) or [0], np.int32)
    place = Span(int(positions[0]), int(positions[-1]) + 1) if span else Picked(0, positions)
    if span:
        positions = np.arange(place.start, place.stop)
    start, stop = min(keys[0], tokens - 1), min(max(keys[0] + 1, keys[1]), tokens)
    whole = np.tril(np.ones((tokens, tokens), bool))[positions][:, start:stop]
    sees, mask = mask_at("causal", place, Span(start, stop))
    if isinstance(mask, str):  # the last query sees the last key
        count, across = whole.shape
        mask = np.arange(across) <= np.arange(across - count, across)[:, None]
    got = np.full_like(whole, sees) if mask is None or not sees else np.array(mask)
    assert (got == whole).all()


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

    assert gated_form(MLP(False)).down == "w2"
    assert gated_form(MLP(True)) is None
    assert gated_form(Residual(False)) is None


def backward_peak(ours, batch):
    begin()
    with recording() as profile:
        ours.value_and_grad(batch)
    # Where the recomputation of attention peaks depends on how far MLX runs ahead.
    phases = ("backward", "MLP backward", "attention backward")
    return max(s.peak_bytes for s in profile.stretches if s.phase in phases)


@pytest.mark.slow
def test_nothing_of_tokens_by_hidden_is_held(tmp_path, memory):
    """Of the whole length only keys and values are in memory; whole blocks hold a multiple."""
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 3}
    folder = save(tmp_path, "qwen3", True, **shape)
    short, long = 1024, 2048
    one = 4 * (long - short) * 512
    keys_and_values = 4 * (long - short) * 2 * 32
    bound = 0.5 * one + keys_and_values

    def grown(rounds=1, **options):
        halves = options["tile_tokens"] is not None
        with closing(engine(folder, halves=halves, prefetch=False, **options)) as ours:
            slice_mlps(ours._walk.blocks, 2**18)
            few, many = (random_batch(1, tokens, share=0.05) for tokens in (short, long))
            ours.value_and_grad(few)  # the first one also tries what can be tiled
            return growth(
                lambda: backward_peak(ours, few), lambda: backward_peak(ours, many), bound, rounds
            )

    assert grown(ROUNDS, tile_tokens=64) < bound
    # The same measurement, far beyond the bound: tiles kept in memory, and whole blocks.
    assert grown(tile_tokens=64, spilled=False) > one
    assert grown(tile_tokens=None) > 4 * one


def test_pieces_are_evaluated_a_slice_at_a_time(tmp_path, monkeypatch):
    """What that saves is measured in `tests/layers/test_order.py`."""
    found, evaluate = {}, Stops.eval

    def watched(order):
        phase = profile._stack[-1][0]
        found[phase] = max(found.get(phase, 0), len(order._stops))
        evaluate(order)

    monkeypatch.setattr(Stops, "eval", watched)
    folder = save(tmp_path, "llama", True, intermediate_size=256)
    with closing(engine(folder, tile_tokens=16, halves=True, prefetch=False)) as ours:
        slice_mlps(ours._walk.blocks, 1)
        with recording() as profile:
            ours.value_and_grad(random_batch(1, 16, share=2.0))
    group = quantizable()["group_size"]
    assert found["forward"] >= 256 // group - 1
    assert found["MLP backward"] >= 256 // group - 1
    assert {"recompute", "attention backward"} <= set(found)


def test_queries_do_not_keep_what_keys_would_be_made_of(tmp_path, monkeypatch):
    """Never computed, they hold the normalized input: one more array of a tile."""
    attend, asked = TiledBlock._attend, []

    def watched(block, ask, *rest):
        asked.append(ask)
        return attend(block, ask, *rest)

    monkeypatch.setattr(TiledBlock, "_attend", watched)
    with closing(engine(save(tmp_path, "llama", True), tile_tokens=5)) as ours:
        ours.value_and_grad(random_batch())
    assert asked
    assert all(ask.k is None and ask.v is None for ask in asked)


def test_sums_of_keys_and_of_values_are_made_one_after_the_other(memory):
    class OnDisk(dict):
        def put(self, number, array):
            self[number] = np.array(array)

        def get(self, number):
            return mx.array(self[number])

        forget = dict.pop

    sums, shape, added = KeySums(OnDisk()), (1, 8, 512, 64), []

    def add():
        pair = [mx.ones(shape, mx.bfloat16), mx.ones(shape, mx.bfloat16)]
        mx.eval(pair)
        sums.add(0, slice(None), pair, 1)
        added.append(1)

    add()
    one = 4 * 8 * 512 * 64
    # Both gradients in 16 bits; of one of them float32, its sum before, and after.
    assert lowest(lambda: above(add), 4.1 * one) < 4.1 * one
    for total in sums.take(0):
        assert (total == len(added)).all().item()


def held_whole(block, weights, index):
    """A trial with the block's arrays read once and bound for good."""
    arrays = weights.block(index)
    mx.eval(arrays)

    class Held(ResidentWeights):
        def block(self, index):
            return arrays

    return trial_of(block, Held(), index)


@pytest.mark.slow
def test_a_trial_does_not_hold_a_block(tmp_path, memory, monkeypatch):
    """A wide block held whole would be the peak of a run's first step."""
    wide = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1}
    wide |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    with closing(engine(save(tmp_path, "llama", True, **wide), tile_tokens=64)) as ours:
        walk = ours._walk
        slice_mlps(walk.blocks, 2**20)
        block = sum(array.nbytes for array in walk.weights.block(0).values())

        def trial():
            walk._tiling._found.clear()
            assert walk._tiling.of(0).branches == BRANCHES

        assert lowest(lambda: above(trial), block) < block
        monkeypatch.setattr("mlx_edgelora.model.tiling.trial_of", held_whole)
        assert above(trial) > 1.3 * block
