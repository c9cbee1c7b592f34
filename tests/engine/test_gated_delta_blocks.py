"""Models with gated delta blocks: gradients of plain MLX in every segment, none of its memory."""

from contextlib import closing

import architectures
import mlx.core as mx
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
from mlx_lm.models import gated_delta as mlx_lm_gated_delta
from mlx_lm.models import kimi_linear
from test_segments import SEGMENTS

from mlx_edgelora.blocks.gated_delta import chunked_gated_delta
from mlx_edgelora.layers import gated_delta

# Names of architectures that `architectures.CONFIGS` does not have, and what differs from its base.
CONFIGS = {
    "qwen3_5": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 3,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    # One decay a channel.
    "kimi_linear": {
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 16,
            "kda_layers": [1, 3],
            "short_conv_kernel_size": 3,
        },
        "model_max_length": 1000,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "num_experts_per_token": 2,
    },
    "qwen3_next": architectures.CONFIGS["qwen3_next"],
    "olmo_hybrid": architectures.CONFIGS["olmo_hybrid"],
}


@pytest.fixture(autouse=True)
def configs(monkeypatch):
    for name, changes in CONFIGS.items():
        monkeypatch.setitem(architectures.CONFIGS, name, changes)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """A model, a batch of several chunks, and loss and gradients of plain MLX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.CONFIGS, request.param, CONFIGS[request.param])
        folder, batch = tmp_path_factory.mktemp(request.param), random_batch(2, 23)
        reference = plain(save(folder, request.param, True))
    loss, gradients = plain_value_and_grad(reference, batch)
    return folder, batch, loss, gradients, resolution(reference, batch)


@pytest.mark.parametrize("segment", SEGMENTS)
def test_gradients_equal_plain_mlx(case, segment, monkeypatch):
    folder, batch, expected_loss, expected, moves = case
    monkeypatch.setattr(gated_delta, "CHUNK", (7, 5))
    with closing(engine(folder, **SEGMENTS[segment])) as ours:
        ours.walk.tile_choice(0, 23)  # trials of single blocks are made outside of a pass
        with monkeypatch.context() as patch:
            patch.setattr(mlx_lm_gated_delta, "_gated_delta_step_ops", None)  # not called
            (loss, _), got = ours.value_and_grad(batch)
            alone, _ = ours.loss(batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert alone.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=moves)


def test_replaced_in_every_module_and_put_back():
    original = mlx_lm_gated_delta.gated_delta_ops
    kimi_linear.own_name = original
    try:
        with chunked_gated_delta():
            replaced = mlx_lm_gated_delta.gated_delta_ops
            assert replaced is not original and kimi_linear.own_name is replaced
        assert mlx_lm_gated_delta.gated_delta_ops is kimi_linear.own_name is original
    finally:
        del kimi_linear.own_name


def test_a_mask_of_numbers_is_left_to_mlx_lm():
    q, v, g = mx.ones((1, 3, 1, 2)), mx.ones((1, 3, 1, 2)), 0.5 * mx.ones((1, 3, 1))
    mask = mx.array([[1, 1, 0]])
    expected = mlx_lm_gated_delta.gated_delta_ops(q, q, v, g, g, None, mask)
    with chunked_gated_delta():
        got = mlx_lm_gated_delta.gated_delta_ops(q, q, v, g, g, None, mask)
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))
