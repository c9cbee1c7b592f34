"""MLX's RMSNorm exchanged: for every architecture, for the time of a walk, with its gradients."""

from contextlib import closing

import mlx.core as mx
import pytest
from architectures import CONFIGS
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)

from mlx_edgelora.blocks import norms
from mlx_edgelora.blocks.norms import bounded_norms

replaced = pytest.mark.skipif(
    mx.default_device() == mx.gpu, reason="MLX's own norm has a fused gradient on a GPU"
)
# cohere2 has layer norms.
NORMED = [name for name in CONFIGS if name != "cohere2"]


@replaced
@pytest.mark.parametrize("name", NORMED)
def test_gradients_equal_mlx_lm(name, tmp_path, monkeypatch):
    calls = []

    def counted(x, weight, eps, *, tile_bytes):
        calls.append(x.shape)
        return original(x, weight, eps, tile_bytes=tile_bytes)

    original = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", counted)
    monkeypatch.setattr(norms, "TILE_BYTES", 3 * 4 * 64)
    folder, batch = save(tmp_path, name, True), random_batch()
    reference = plain(folder)
    _, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder)) as ours:
        _, got = ours.value_and_grad(batch)
    assert calls
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


@replaced
def test_it_is_undone_on_exit_and_on_error():
    before = mx.fast.rms_norm
    with bounded_norms():
        assert mx.fast.rms_norm is not before
    assert mx.fast.rms_norm is before
    with pytest.raises(RuntimeError, match="stop"), bounded_norms():
        raise RuntimeError("stop")
    assert mx.fast.rms_norm is before


def test_another_stream_is_left_alone(monkeypatch):
    monkeypatch.setattr(norms, "rms_norm", None)
    with bounded_norms():
        mx.fast.rms_norm(mx.ones((2, 4)), None, 1e-5, stream=mx.cpu)
