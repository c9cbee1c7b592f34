"""Multi-head latent attention: mlx-lm gives attention its rotary scores as a floating mask.

Rows are long enough that attention goes by tiles here (more than 1 MiB of scores).
"""

import json
from contextlib import closing
from pathlib import Path

import architectures
import mlx.core as mx
import pytest
from architectures import relative_error
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from mlx.utils import tree_flatten
from peaks import ROUNDS, above, growth, peak

from mlx_edgelora.blocks import attention
from mlx_edgelora.blocks.attention import TILE_BYTES
from mlx_edgelora.layers import attention as layers_attention
from mlx_edgelora.layers import head_attention

SWEEP = json.loads((Path(__file__).parents[1] / "sweep" / "configs.json").read_text())

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


def model(folder, heads, packed=True, **changes):
    changes = MLA | {"num_attention_heads": heads, "num_key_value_heads": heads} | changes
    return save(folder, "deepseek_v3", packed, **changes)


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


@pytest.fixture
def appended(monkeypatch):
    """Heads and shapes of the rotary keys that were appended to keys."""
    found, original = [], head_attention.append

    def spied(queries, keys, added, scale):
        found.append((keys.shape[1], added[1].shape))
        return original(queries, keys, added, scale)

    monkeypatch.setattr(attention, "append", spied)
    monkeypatch.setattr(head_attention, "append", spied)
    return found


@pytest.mark.parametrize("tokens", [TOKENS, pytest.param(640, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_all_gradients_equal_plain_mlx(case, way, tokens, appended, monkeypatch):
    monkeypatch.setattr(attention, "TILE_BYTES", 2**18)  # a tile of 48 tokens is more
    folder, gradients = case
    batch, expected_loss, expected = gradients(tokens)
    with closing(engine(folder, **WAYS[way])) as ours:
        if "tile_tokens" in WAYS[way]:
            choices = [ours.walk.tile_choice(index, tokens) for index in range(2)]
            assert all(choice.possible and choice.through_cache for choice in choices)
        (loss, _), got = ours.value_and_grad(batch)
    assert appended and all(shape[1] == 1 for _, shape in appended)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    got, expected = dict(tree_flatten(got)), dict(tree_flatten(expected))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.abs(value).max().item() > 0, name
        assert relative_error(got[name], value) <= 1e-5, name


# All that make the scores of their rotary parts themselves, with the sweep's configurations.
KINDS = ("glm4_moe_lite", "kimi_linear", "longcat_flash", "deepseek_v32", "deepseek_v32:sparse")
KINDS += ("deepseek_v3:plain_rope", "glm_moe_dsa", "bailing_hybrid", "bailing_moe_v3")
KINDS += ("kimi_k3:no_attn_res", "longcat_flash_ngram")
FAST = ("kimi_linear", "longcat_flash", "deepseek_v32:sparse")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in KINDS]
)
@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_every_kind_appends_its_rotary_parts(name, way, tmp_path, appended, monkeypatch):
    own = name.partition(":")[0]
    monkeypatch.setitem(architectures.CONFIGS, own, SWEEP[name])
    monkeypatch.setattr(attention, "TILE_BYTES", 1)  # no tile has few scores
    monkeypatch.setattr(layers_attention, "TILE_BYTES", 512)
    monkeypatch.setattr(head_attention, "HEAD_BYTES", 4 * 2 * 23 * 96 * 2)  # of two heads
    folder, batch = save(tmp_path, own, True), random_batch(2, 23)
    reference = plain(folder)
    _, expected = plain_value_and_grad(reference, batch)
    # Which keys are attended to has no gradient, so nor have the layers that decide it.
    expected = {n: v for n, v in tree_flatten(expected) if mx.any(v).item()}
    with closing(engine(folder, **({"tile_tokens": 10} if way == "tiles" else {}))) as ours:
        _, got = ours.value_and_grad(batch)
    got = {n: v for n, v in tree_flatten(got) if n in expected or mx.any(v).item()}
    assert appended and all(shape[1] == 1 for _, shape in appended)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


def test_dropout_draws_the_masks_of_mlx_lm(tmp_path, appended):
    folder, batch = model(tmp_path, 20), random_batch(1, TOKENS)
    reference = plain(folder, dropout=0.3)
    mx.random.seed(5)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, dropout=0.3)) as ours:
        mx.random.seed(5)
        _, got = ours.value_and_grad(batch)
    assert appended
    assert_same_gradients(got, expected)


@pytest.mark.slow
def test_blocks_that_are_compiled_append_them_as_well(tmp_path, appended, small_pieces, compiles):
    folder, batch = model(tmp_path, 20), random_batch(1, TOKENS)
    _, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, compiled=True)) as ours:
        _, got = ours.value_and_grad(batch)
    assert appended
    assert_same_gradients(got, expected)


@pytest.fixture
def small_pieces(monkeypatch):
    """Less at a time, so that short rows have many pieces."""
    monkeypatch.setattr(attention, "TILE_BYTES", 2**18)
    monkeypatch.setattr(layers_attention, "TILE_BYTES", 2**18)
    monkeypatch.setattr(head_attention, "HEAD_BYTES", 2**20)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_peak_does_not_hold_tokens_times_tokens(tmp_path, way, memory, small_pieces, monkeypatch):
    """One array of scores, float32 for every head, is more than all that a step takes."""
    heads, tokens, batch = 20, 768, random_batch(1, 768)
    scores = 4 * heads * tokens**2
    folder, peaks = model(tmp_path, heads), []
    for remembered in (True, False):
        if not remembered:  # the measure sees what is held
            monkeypatch.setattr(attention, "factors_of", lambda *_: None)
        with closing(engine(folder, prefetch=False, **WAYS[way])) as ours:
            ours.value_and_grad(batch)
            peaks.append(above(lambda ours=ours: ours.value_and_grad(batch)))
    assert peaks[0] < scores / 2
    assert peaks[1] > peaks[0] + 4 * heads * tokens * WAYS[way].get("tile_tokens", tokens)


@pytest.mark.slow
def test_peak_by_tiles_grows_by_latents_alone(tmp_path, memory, small_pieces, monkeypatch):
    """Latents, rotary keys and their gradients; less than keys and values of the heads take."""
    heads, short, long, latents = 16, 384, 1024, 64
    widths = {"kv_lora_rank": latents, "qk_nope_head_dim": 64, "v_head_dim": 64}
    folder = model(tmp_path, heads, **widths, hidden_size=128, qk_rope_head_dim=32)
    keys_and_values = 4 * (long - short) * heads * (64 + 32 + 64)
    # In their own dtype twice (one tile's gradient), and as sums.
    bound = 3 * 4 * (long - short) * (latents + 32)

    def grown(rounds=1):
        with closing(engine(folder, prefetch=False, tile_tokens=128)) as ours:
            few, many = (random_batch(1, tokens, share=0.05) for tokens in (short, long))
            ours.value_and_grad(few)  # the first one also tries what can be tiled

            def peak_of(batch):
                return lambda: peak(lambda: ours.value_and_grad(batch))

            return growth(peak_of(few), peak_of(many), bound, rounds)

    assert bound < keys_and_values / 2
    assert grown(ROUNDS) <= bound
    # The same measurement where the rotary scores are a mask.
    monkeypatch.setattr(attention, "factors_of", lambda *_: None)
    assert grown() > 2 * keys_and_values


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_keys_and_values_are_made_for_some_heads_at_a_time(tmp_path, way, packed, monkeypatch):
    heads, tokens = 20, TOKENS
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 64}  # or these matrices are not packed
    monkeypatch.setattr(head_attention, "HEAD_BYTES", 3 * 4 * tokens * 80)  # of three heads
    monkeypatch.setattr(attention, "TILE_BYTES", 1)  # no tile has few scores
    made, original = [], head_attention.attend_by_heads

    def spied(queries, *args, added, **options):
        made.append((queries.shape[1], *(array.shape[1] for array in added)))
        return original(queries, *args, added=added, **options)

    monkeypatch.setattr(attention, "attend_by_heads", spied)
    folder, batch = model(tmp_path, heads, packed, **sizes), random_batch(1, tokens)
    _, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, **WAYS[way])) as ours:
        _, got = ours.value_and_grad(batch)
    assert set(made) == {(heads, heads, 1)}
    assert_same_gradients(got, expected)
