"""DoRA in every kind of segment: the gradients of mlx-lm's own DoRA layers."""

from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
import pytest
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
from mlx_lm.tuner.dora import DoRALinear as MlxDoRALinear
from mlx_lm.utils import load_model

from mlx_edgelora.blocks import gated_mlp
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.dora import row_norms
from mlx_edgelora.model.lora import add_lora

SEGMENTS = {
    "recomputed, streamed": {},
    "recomputed, layer by layer": {"mlp_bytes": None},
    "fused kernel": {"kernel": "fused", "mlp_bytes": None},
    "in memory": {"streamed": False, "spilled": False},
    "tiles of 5 tokens": {"tile_tokens": 10},
    "thin slices": {"mlp_bytes": 1},
    "kept": {"kept_blocks": 1},
    "tail": {"kept_blocks": 3, "head": "resident"},
    "paged": {"adapters": "paged"},
}
MODELS = {
    "llama, 4 bits": ("llama", True, {}),
    "qwen2, with biases": ("qwen2", False, {}),
    "gemma2, 4 bits": ("gemma2", True, {}),
}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    name, quantized, lora = MODELS[request.param]
    folder, batch = tmp_path_factory.mktemp(name), random_batch(2, 17)
    reference = plain(save(folder, name, quantized), dora=True, **lora)
    loss, gradients = plain_value_and_grad(reference, batch)
    return folder, batch, loss, gradients, resolution(reference, batch)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("case", MODELS, indirect=True)
def test_gradients_equal_those_of_mlx_lm(case, segment):
    folder, batch, expected_loss, expected, moves = case
    with closing(engine(folder, dora=True, **SEGMENTS[segment])) as ours:
        (loss, _), got = ours.value_and_grad(batch)
    names = [name.rpartition(".")[2] for name in dict(tree_flatten(got))]
    assert names.count("m") == names.count("lora_a") == names.count("lora_b") > 0
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=moves)


@pytest.mark.slow
@pytest.mark.parametrize("segment", SEGMENTS)
def test_compiled_the_gradients_are_the_same(tmp_path, segment, compiles):
    folder, batch = save(tmp_path, "llama", True), random_batch(2, 17)
    _, expected = plain_value_and_grad(plain(folder, dora=True), batch)
    with closing(engine(folder, dora=True, compiled=True, **SEGMENTS[segment])) as ours:
        for _ in range(2):
            _, got = ours.value_and_grad(batch)
    assert_same_gradients(got, expected)


def test_mlps_are_computed_in_slices(tmp_path, monkeypatch):
    widths, own = [], gated_mlp.gated_mlp

    def watched(x, first, *rest, **options):
        widths.append((first.gain.shape, options["tile_bytes"]))
        return own(x, first, *rest, **options)

    monkeypatch.setattr(gated_mlp, "gated_mlp", watched)
    with closing(engine(save(tmp_path, "llama", True), dora=True, mlp_bytes=1)) as ours:
        ours.value_and_grad(random_batch(2, 17))
    assert set(widths) == {((96,), 1)}


@pytest.mark.parametrize("segment", ["recomputed, streamed", "kept", "paged", "tiles of 5 tokens"])
def test_dropout_draws_the_masks_of_mlx_lm(tmp_path, segment):
    folder, batch = save(tmp_path, "llama", True), random_batch(2, 17)
    reference = plain(folder, dora=True, dropout=0.3)
    mx.random.seed(3)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, dora=True, dropout=0.3, **SEGMENTS[segment])) as ours:
        mx.random.seed(3)
        (loss, _), got = ours.value_and_grad(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("keys", [["lm_head"], ["model.embed_tokens", "self_attn.q_proj"]], ids=str)
def test_layers_outside_the_blocks(tmp_path, keys):
    folder, batch = save(tmp_path, "llama", False), random_batch(2, 17)
    expected_loss, expected = plain_value_and_grad(plain(folder, dora=True, keys=keys), batch)
    with closing(engine(folder, dora=True, keys=keys)) as ours:
        (loss, _), got = ours.value_and_grad(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize(
    ("name", "bits", "keys", "sentence"),
    [
        (
            "qwen3_moe",
            None,
            None,
            r"dora cannot adapt model\.layers\.\d+\.mlp\.switch_mlp\.\w+ "
            r"\(SwitchLinear\): mlx-lm has no DoRA",
        ),
        ("llama", 4, ["model.embed_tokens"], r"adapt model\.embed_tokens \(QuantizedEmbedding\)"),
        ("llama", 3, ["mlp.up_proj"], r"adapt model\.layers\.0\.mlp\.up_proj .* 3 bits"),
    ],
)
def test_layers_that_dora_cannot_adapt_are_named(tmp_path, name, bits, keys, sentence):
    model, _ = load_model(save(tmp_path, name, False))
    if bits is not None:
        nn.quantize(model, 32, bits)
    with pytest.raises(EdgeLoraError, match=sentence):
        add_lora(model, -1, keys=keys, dora=True)


@pytest.mark.parametrize("bits", [None, 2, 4, 8])
def test_norms_of_rows_equal_those_of_the_whole_matrix(bits):
    mx.random.seed(0)
    linear = nn.Linear(64, 37)
    if bits is not None:
        linear = linear.to_quantized(32, bits)
    dora = MlxDoRALinear.from_base(linear, r=5, scale=3.0)
    dora.lora_b = mx.random.normal(dora.lora_b.shape)
    whole = dora._dequantized_weight() + (3.0 * dora.lora_b.T) @ dora.lora_a.T
    for tile_bytes in (1, 4 * 64 * 5, None):
        got = row_norms(linear, dora.lora_a, dora.lora_b, 3.0, tile_bytes=tile_bytes)
        assert mx.allclose(got, mx.linalg.norm(whole, axis=1), rtol=1e-6, atol=0)
        assert mx.array_equal(row_norms(linear, tile_bytes=tile_bytes), dora.m)


def test_a_matrix_is_never_unpacked_whole(memory):
    linear = nn.QuantizedLinear(2048, 4096, bias=False)
    a, b = mx.random.normal((2048, 4)), mx.random.normal((4, 4096))
    mx.eval(linear.parameters(), a, b)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(row_norms(linear, a, b, 2.0, tile_bytes=2**18))
    assert mx.get_peak_memory() - before < 4 * 2048 * 4096 / 4
