"""Gradients of the blocks' own weights, in every kind of segment, against plain MLX."""

from contextlib import closing

import mlx.core as mx
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
MODELS = ("llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss", "qwen3_next", "olmo_hybrid")
FAST = {("llama", "whole"), ("qwen3_moe", "tiles"), ("llama", "mixed")}
CASES = [
    (name, way) if (name, way) in FAST else pytest.param(name, way, marks=pytest.mark.slow)
    for name in MODELS
    for way in WAYS
]


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
    """With 16-bit sums the error of many tiles is several times that of one."""
    save(tmp_path, "llama", False)
    batch, rows = random_batch(rows=1, tokens=32), {}
    exact = dict(tree_flatten(plain_value_and_grad(plain_full(tmp_path), batch)[1]))
    for tile_tokens in (1, None):
        options = {"dtype": "bfloat16", "tile_tokens": tile_tokens}
        with closing(engine(tmp_path, full=True, **options)) as ours:
            found = dict(tree_flatten(ours.value_and_grad(batch)[1]))
        assert {value.dtype for value in found.values()} == {mx.bfloat16}
        rows[tile_tokens] = np.mean([norm(found[n] - g) / norm(g) for n, g in exact.items()])
    assert rows[1] < 1.5 * rows[None]
