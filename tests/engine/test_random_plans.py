"""Gradients are the same under every plan."""

from dataclasses import replace

import pytest
from harness import (
    assert_same_gradients,
    plain,
    plain_value_and_grad,
    random_batch,
    randomize,
    resolution,
    save,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.plan import Plan

pytestmark = pytest.mark.slow

COUNT = 3  # blocks of the tiny models

WHOLE = st.builds(
    Plan,
    streamed_blocks=st.none() | st.integers(0, COUNT),
    head=st.sampled_from(["streamed", "resident"]),
    prefetch=st.booleans(),
    kept_blocks=st.integers(0, COUNT),
    inputs=st.sampled_from(["file", "memory"]),
    adapters=st.sampled_from(["resident", "paged"]),
    mlp_bytes=st.none() | st.integers(4096, 2**17),
    kernel=st.sampled_from(["auto", "fused", "dequantize"]),
    loss_bytes=st.integers(4096, 2**17),
    micro_batches=st.integers(1, 3),
)
TILED = st.builds(
    Plan,
    streamed_blocks=st.none() | st.integers(0, COUNT),
    prefetch=st.booleans(),
    inputs=st.sampled_from(["file", "memory"]),
    adapters=st.sampled_from(["resident", "paged"]),
    tile_tokens=st.integers(1, 60),
    key_tokens=st.none() | st.integers(1, 60),
    mlp_bytes=st.none() | st.integers(4096, 2**17),
    kernel=st.sampled_from(["auto", "fused", "dequantize"]),
    loss_bytes=st.integers(4096, 2**17),
    micro_batches=st.integers(1, 3),
)
BY_ROWS = TILED.map(lambda plan: replace(plan, mlp_weights="rows") if plan.mlp_bytes else plan)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def known(request, tmp_path_factory):
    """A checkpoint, batches, and what plain MLX makes of them."""
    folder = save(tmp_path_factory.mktemp("model"), request.param, quantized=True)
    reference, found = plain(folder), []
    for rows, tokens in ((3, 17), (1, 40)):
        batch = random_batch(rows, tokens)
        loss, gradients = plain_value_and_grad(reference, batch)
        found.append((batch, loss, gradients, resolution(reference, batch)))
    return folder, found


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(plans=st.lists(WHOLE | TILED | BY_ROWS, min_size=1, max_size=3))
def test_gradients_equal_mlx_lm(known, plans):
    """Of the first plan, and of others that the same engine is given between batches."""
    folder, batches = known
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder / "cache")
    add_lora(lazy.model, -1, rank=4, scale=3.0)
    randomize(lazy.model)
    with build_engine(lazy, plans[0], Settings(folder)) as engine:
        for plan in plans:
            engine.set_plan(plan)
            for batch, loss, expected, moves in batches:
                (got_loss, _), got = engine.value_and_grad(batch)
                assert got_loss.item() == pytest.approx(loss, rel=1e-5)
                assert engine.loss(batch)[0].item() == pytest.approx(loss, rel=1e-5)
                assert_same_gradients(got, expected, resolution=moves)
