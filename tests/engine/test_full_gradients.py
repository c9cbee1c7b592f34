"""Gradients of the blocks' own weights, in every kind of segment, against plain MLX."""

from contextlib import closing

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from harness import (
    assert_same_gradients,
    engine,
    norm,
    plain_full,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from mlx.utils import tree_flatten
from peaks import begin, held, lowest, peak

TILES = {"tile_tokens": 10, "mlp_bytes": 2**12}
# How blocks are computed, and where what they need is kept.
WAYS = {
    "whole": {},
    "tiles": TILES | {"adapters": "paged"},
    "kept": {"kept_blocks": 2, "head": "streamed", "adapters": "paged"},
    "tail": {"kept_blocks": 2, "head": "resident", "streamed": False, "spilled": False},
    "mixed": TILES | {"num_layers": 1},
    "tiles of whole experts": {"tile_tokens": 10, "adapters": "paged", "streamed": False},
}
FAST = [("llama", "whole"), ("llama", "mixed"), ("qwen3_moe", "tiles")]
SLOW = [
    *(("llama", way) for way in ("tiles", "kept", "tail")),
    *(("qwen3_moe", way) for way in ("kept", "tail", "tiles of whole experts")),
    *(("gemma3_text", way) for way in ("tiles", "tail")),
    *(("gpt_oss", way) for way in ("tiles", "whole")),
    *(("qwen3_next", way) for way in ("tiles", "kept")),
    ("olmo_hybrid", "tiles"),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_all_weights_get_the_gradients_of_plain_mlx(name, way, tmp_path):
    options, batch = WAYS[way], random_batch()
    model = plain_full(save(tmp_path, name, False), options.get("num_layers", -1))
    value, expected = plain_value_and_grad(model, batch)
    with closing(engine(tmp_path, full=True, **options)) as ours:
        (loss, _), got = ours.value_and_grad(batch)
        again = ours.loss(batch)[0]
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert again.item() == pytest.approx(value, rel=1e-5)
    assert_same_gradients(got, expected, resolution=resolution(model, batch))


@pytest.mark.slow
def test_tiles_are_summed_in_float32(tmp_path):
    """So that the error of 16 bits is the same for many tiles: 16-bit sums add a quarter to it."""
    model = plain_full(save(tmp_path, "llama", False), 1)
    batch, errors = random_batch(rows=1, tokens=128, share=1.0), []
    exact = dict(tree_flatten(plain_value_and_grad(model, batch)[1]))
    for tile_tokens in (1, None):
        options = {"dtype": "bfloat16", "tile_tokens": tile_tokens, "num_layers": 1}
        with closing(engine(tmp_path, full=True, **options)) as ours:
            found = dict(tree_flatten(ours.value_and_grad(batch)[1]))
        assert {value.dtype for value in found.values()} == {mx.bfloat16}
        errors.append(np.mean([norm(found[n] - g) / norm(g) for n, g in exact.items()]))
    assert errors[0] < 1.08 * errors[1]


def narrow(folder, depth):
    """A Llama whose blocks are several times as large as what a few tokens need."""
    sizes = {"hidden_size": 128, "intermediate_size": 768, "num_attention_heads": 8}
    return save(folder, "llama", False, num_hidden_layers=depth, tie_word_embeddings=True, **sizes)


@pytest.mark.slow
def test_a_step_and_its_preparation_hold_a_few_blocks(tmp_path, memory):
    """Weights and moments of all blocks are in a file: the peak is a fraction of theirs."""
    depth, batch, least = 12, random_batch(rows=2, tokens=8), held()
    narrow(tmp_path, depth)

    def prepare():
        return engine(tmp_path, full=True, tile_tokens=8, adapters="paged")

    begin()
    ours = prepare()
    prepared = mx.get_peak_memory() - least
    blocks = sum(v.nbytes for _, v in tree_flatten(ours.model.trainable_parameters()))
    one = blocks / depth
    assert one > 1.3e6
    optimizer = optimizers.AdamW(1e-5)
    ours.adapters.start(optimizer)

    def step():
        ours.backward(batch, ours.adapters.add)
        ours.adapters.update(optimizer, 1)

    step()
    needed = lowest(lambda: peak(step) - least, 7 * one)
    assert prepared < 2 * one
    assert needed < 7 * one < (1 + 2) * blocks / 5  # AdamW has two moments
    ours.close()
