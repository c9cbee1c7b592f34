"""Multi-head latent attention: its rotary scores go into attention as a floating mask.

Rows are long enough that attention goes by tiles here (more than 1 MiB of scores).
"""

from contextlib import closing

import mlx.core as mx
import pytest
from architectures import relative_error
from harness import assert_same_gradients, engine, plain, plain_value_and_grad, random_batch, save
from mlx.utils import tree_flatten
from peaks import above

from mlx_edgelora.blocks import attention
from mlx_edgelora.blocks.attention import TILE_BYTES
from mlx_edgelora.layers import head_attention

# As GLM-4.7-Flash and DeepSeek V3 have them; all else is small.
HEADS = (20, 128)
# Scores of 20 heads are more than a megabyte from 115 tokens on.
TOKENS = 160
MLA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
WAYS = {
    "whole": {},
    "tiles": {"tile_tokens": 48},
    "kept": {"streamed": False, "spilled": False, "kept_blocks": 9, "inputs": "memory"},
}


def model(folder, heads, **changes):
    changes = MLA | {"num_attention_heads": heads, "num_key_value_heads": heads} | changes
    return save(folder, "deepseek_v3", True, **changes)


@pytest.fixture(scope="module", params=HEADS, ids=lambda heads: f"{heads} heads")
def case(request, tmp_path_factory):
    """A model, and the gradients of plain MLX by number of tokens."""
    folder = model(tmp_path_factory.mktemp("mla"), request.param)
    expected = {}

    def gradients(tokens):
        if tokens not in expected:
            batch = random_batch(1, tokens)
            assert 4 * request.param * tokens**2 > TILE_BYTES  # or attention is left to MLX
            expected[tokens] = batch, *plain_value_and_grad(plain(folder), batch)
        return expected[tokens]

    return folder, gradients


@pytest.mark.parametrize("tokens", [TOKENS, pytest.param(640, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_all_gradients_equal_plain_mlx(case, way, tokens):
    folder, gradients = case
    batch, expected_loss, expected = gradients(tokens)
    with closing(engine(folder, **WAYS[way])) as ours:
        if "tile_tokens" in WAYS[way]:
            choices = [ours.walk.tile_choice(index, tokens) for index in range(2)]
            assert all(choice.possible and choice.through_cache for choice in choices)
        (loss, _), got = ours.value_and_grad(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    got, expected = dict(tree_flatten(got)), dict(tree_flatten(expected))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.abs(value).max().item() > 0, name
        assert relative_error(got[name], value) <= 1e-5, name


@pytest.mark.slow
def test_peak_by_tiles_does_not_hold_tokens_times_tokens(tmp_path, memory):
    """One array of scores, float32 for every head, is more than all that a step takes."""
    heads, tokens, batch = 20, 768, random_batch(1, 768)
    scores = 4 * heads * tokens**2
    folder = model(tmp_path, heads)
    peaks, ways = {}, {"whole": {}, "tiles": {"tile_tokens": 48, "prefetch": False}}
    for way, options in ways.items():
        with closing(engine(folder, **options)) as ours:
            ours.value_and_grad(batch)
            peaks[way] = above(lambda ours=ours: ours.value_and_grad(batch))
    assert peaks["tiles"] < scores / 2
    assert peaks["whole"] > 2 * scores  # the measure sees what is held


@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_keys_and_values_are_made_for_some_heads_at_a_time(tmp_path, way, monkeypatch):
    heads, tokens = 20, TOKENS
    packed = {"kv_lora_rank": 64, "qk_nope_head_dim": 64}  # or these matrices are not packed
    monkeypatch.setattr(head_attention, "HEAD_BYTES", 3 * 4 * tokens * 72)  # of three heads
    monkeypatch.setattr(attention, "TILE_BYTES", 1)  # no tile has few scores
    made, original = [], head_attention.attend_by_heads

    def spied(queries, *args, **options):
        made.append(queries.shape[1])
        return original(queries, *args, **options)

    monkeypatch.setattr(attention, "attend_by_heads", spied)
    folder, batch = model(tmp_path, heads, **packed), random_batch(1, tokens)
    _, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, **WAYS[way])) as ours:
        _, got = ours.value_and_grad(batch)
    assert set(made) == {heads}
    assert_same_gradients(got, expected)
