"""Attention knows whether a gradient is traced: MLX on Metal is fused in other cases then."""

import mlx.core as mx
import pytest
from harness import engine, random_batch, save

from mlx_edgelora.blocks import attention
from mlx_edgelora.blocks.attention import tracing_gradient


@pytest.fixture
def asked(monkeypatch):
    """What `use_fused` was told, and whether it was so: each time that attention was called."""
    found, depth = [], [0]

    def counting(name):
        original = getattr(mx, name)

        def transformed(function, *args, **kwargs):
            def inside(*values, **named):
                depth[0] += 1
                try:
                    return function(*values, **named)
                finally:
                    depth[0] -= 1

            return original(inside, *args, **kwargs)

        return transformed

    for name in ("vjp", "value_and_grad"):
        monkeypatch.setattr(mx, name, counting(name))

    def spy(q, k, v, *, traced, mask, sinks):
        found.append((traced, depth[0] > 0))
        return False, "a spy"

    monkeypatch.setattr(attention, "use_fused", spy)
    monkeypatch.setattr(attention, "TILE_BYTES", 0)  # nothing is small
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"tile_tokens": 8},
        {"kept_blocks": 1, "head": "streamed"},
        {"kept_blocks": 1, "head": "resident"},
    ],
    ids=["whole", "tiles", "kept", "tail"],
)
def test_every_way_to_compute_a_block_says_so_truly(way, compiled, asked, tmp_path, request):
    if compiled:
        request.getfixturevalue("compiles")
    ours = engine(save(tmp_path, "llama", False), compiled=compiled, **way)
    batch = random_batch(1, 17)
    ours.loss(batch)
    assert asked and set(asked) == {(False, False)}
    ours.value_and_grad(batch)
    assert set(asked) == {(False, False), (True, True)}
    ours.close()


def test_it_is_forgotten_on_an_error():
    with pytest.raises(RuntimeError, match="stop"), tracing_gradient():
        assert attention._traced == [True]
        raise RuntimeError("stop")
    assert attention._traced == [False]
