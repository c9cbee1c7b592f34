"""Hidden states that get wider on their way, as in models packed as fp4 or fp8.

`mx.dequantize` gives bfloat16 for these, whatever the norms are; so the embedding's rows are
bfloat16, and behind the first norm of float16 or float32 everything is float32.
"""

from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import build, config, relative_error
from harness import engine, plain, plain_value_and_grad, random_batch
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import save_config, save_model
from pairwise import pairwise

PACKINGS = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8), "affine": (32, 4)}
WAYS = {
    "whole": {},
    "in memory": {"streamed": False, "spilled": False},
    "tiles": {"tile_tokens": 8},
    "kept": {"kept_blocks": 2},
    "all kept": {"streamed": False, "spilled": False, "kept_blocks": 9},
}


def cast(module, dtype):
    """All floating arrays of a module, scales of packed ones included."""
    floats = lambda v: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v  # noqa: E731
    module.update(tree_map(floats, module.parameters()))


def save(folder, mode, dtypes, name="llama"):
    """A packed model whose blocks' other weights have one dtype after the other."""
    group_size, bits = PACKINGS[mode]
    model = build(name, tie_word_embeddings=False)
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    nn.quantize(model, **settings, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    cast(model, dtypes[0])
    for block, dtype in zip(model.layers, dtypes, strict=False):
        cast(block, dtype)
    save_model(folder, model)
    changes = {"tie_word_embeddings": False, "quantization": settings}
    save_config(config(name) | changes, folder / "config.json")
    return folder


def assert_as_plain_mlx(folder, tolerance, **options):
    batch = random_batch(tokens=19)
    expected_loss, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, **options)) as ours:
        (loss, _), got = ours.value_and_grad(batch)
        again, _ = ours.loss(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=tolerance)
    assert again.item() == pytest.approx(loss.item(), rel=tolerance)
    got, expected = dict(tree_flatten(got)), dict(tree_flatten(expected))
    for name, value in expected.items():
        assert relative_error(got[name], value) <= tolerance, name


@pytest.mark.parametrize(
    ("mode", "dtype", "way"),
    pairwise(["mxfp4", "nvfp4", "mxfp8"], [mx.float16, mx.float32], WAYS),
    ids=str,
)
def test_packed_as_floats_with_wider_norms(mode, dtype, way, tmp_path):
    """From the second operation on everything is float32, in plain MLX as well."""
    assert_as_plain_mlx(save(tmp_path, mode, [dtype] * 3), 1e-5, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "dtypes",
    [(mx.bfloat16, mx.float32, mx.bfloat16), (mx.float16, mx.bfloat16, mx.float16)],
    ids=["one block of float32", "bfloat16 beside float16"],
)
def test_a_block_of_another_dtype(dtypes, way, tmp_path):
    """What is 16 bits is rounded differently tile by tile: a bound that sees wrong gradients."""
    assert_as_plain_mlx(save(tmp_path, "affine", dtypes), 0.1, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_keys_of_another_dtype_than_values(way, tmp_path):
    """A norm of queries and keys in float32, as published checkpoints have some."""
    model = build("qwen3")
    cast(model, mx.bfloat16)
    for block in model.layers:
        cast(block.self_attn.k_norm, mx.float32)
    save_model(tmp_path, model)
    save_config(config("qwen3"), tmp_path / "config.json")
    assert_as_plain_mlx(tmp_path, 0.1, **WAYS[way])


@pytest.mark.parametrize(
    ("dtype", "mode", "streamed"),
    pairwise(["float32", "float16", "bfloat16"], PACKINGS, [True, False]),
)
def test_a_dtype_that_is_asked_for_is_that_of_all_hidden_states(
    dtype, mode, streamed, tmp_path, monkeypatch
):
    folder, seen = save(tmp_path, mode, [mx.float16] * 3), set()
    with closing(engine(folder, dtype=dtype, streamed=streamed)) as ours:
        put = ours.walk.store.put
        monkeypatch.setattr(
            ours.walk.store, "put", lambda slot, x: (seen.add(x.dtype), put(slot, x))
        )
        ours.value_and_grad(random_batch())
    assert seen == {getattr(mx, dtype)}
