"""Expected peaks against measured ones: a part of the grid of `benchmarks/plans.py`."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import build, config
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from peaks import begin, highest
from test_search import LOAD, LOADS, SHAPE, SHAPES

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.build import Settings, assembled
from mlx_edgelora.model.checkpoint import write_model
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner import cost
from mlx_edgelora.planner.cost import Load, Memory, Phase
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import MARGIN, needed
from mlx_edgelora.planner.shape import shape_of

pytestmark = pytest.mark.slow

# As wide as Qwen-2.5-0.5B, two blocks, a small vocabulary.
WIDE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
}
TOKENS = 160
PLANS = {
    "tiles": Plan(
        prefetch=False, adapters="paged", tile_tokens=80, mlp_bytes=4 * MIB, loss_bytes=16 * MIB
    ),
    "streamed": Plan(adapters="paged", mlp_bytes=8 * MIB),
    "resident": Plan(streamed_blocks=0, head="resident", inputs="memory", mlp_bytes=16 * MIB),
    "kept": Plan(streamed_blocks=0, head="resident", kept_blocks=2),
    "one kept": Plan(streamed_blocks=1, kept_blocks=1, inputs="memory"),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    model = build("qwen2", **WIDE)
    nn.quantize(model, 64, 4)
    settings = config("qwen2") | WIDE | {"quantization": {"group_size": 64, "bits": 4}}
    write_model(folder, tree_flatten(model.parameters()), settings)
    return folder


@pytest.mark.parametrize("name", PLANS)
def test_a_step_takes_what_was_expected(wide, name, memory):
    """Within the planner's margin; never more than the budget that it is chosen for."""
    lazy = open_model(str(wide), streamed=True, quantize=None, cache=wide)
    add_lora(lazy.model, -1, rank=16)
    shape = shape_of(checked_blocks(lazy.model), lazy.vocabulary, mx.float32)
    tokens = np.random.RandomState(0).randint(0, 2048, (1, TOKENS + 1)).astype(np.int32)
    batch = Batch(tokens, np.array([[TOKENS // 2, TOKENS + 1]], np.int32), (0,))
    load = Load(1, TOKENS, int(batch.mask().sum()))
    expected = Memory(shape, load, PLANS[name]).peak()
    with assembled(lazy, PLANS[name], Settings(wide, "float32")) as engine:
        optimizer = optim.AdamW(1e-4)
        engine.trained.start(optimizer)
        # As in a run: how far MLX runs ahead is bounded by its limit alone.
        before = mx.set_memory_limit(needed(expected))

        def step():
            begin()
            engine.backward(batch, engine.trained.add)
            engine.trained.update(optimizer, 1)
            return mx.get_peak_memory()

        step()
        measured = highest(step)
        mx.set_memory_limit(before)
    assert measured <= needed(expected)
    assert measured == pytest.approx(expected, rel=MARGIN)


WAYS = st.fixed_dictionaries({"kept_blocks": st.integers(0, 80)}) | st.fixed_dictionaries(
    {"tile_tokens": st.sampled_from([256, 512, 2048])}
)
HELD = {
    "streamed_blocks": st.none() | st.integers(0, 80),
    "inputs": st.sampled_from(["file", "memory"]),
    "head": st.sampled_from(["resident", "streamed"]),
    "adapters": st.sampled_from(["resident", "paged"]),
    "prefetch": st.booleans(),
    "mlp_bytes": st.sampled_from([None, 4 * MIB, 16 * MIB]),
    "micro_batches": st.integers(1, 4),
}


@settings(deadline=None, max_examples=150)
@given(shape=SHAPES, load=LOADS, way=WAYS, held=st.fixed_dictionaries(HELD))
def test_the_ends_are_all_that_decides(shape, load, way, held):
    """The peak over the blocks that are looked at is that over all blocks."""
    memory = Memory(shape, load, Plan(**way, **held))
    assert memory.peak() == max(phase.bytes for phase in memory.phases())


def test_every_phase_has_fitted_numbers():
    """One without would be expected to need nothing on top."""
    kinds = set()
    for packed in (True, False):
        for gated in (True, False):
            shape = replace(SHAPE, packed=packed, gated=gated)
            for mlp_bytes in (None, 4 * MIB):
                plans = [Plan(kept_blocks=kept, mlp_bytes=mlp_bytes) for kept in (0, 3, 28)]
                plans += [Plan(adapters="paged", tile_tokens=512, mlp_bytes=mlp_bytes)]
                for plan in plans:
                    kinds |= {phase.kind for phase in Memory(shape, LOAD, plan).phases()}
    assert kinds - {"embedding"} <= set(cost.FITTED)


def test_of_two_sums_the_larger_counts(monkeypatch):
    monkeypatch.setattr(cost, "FITTED", {"a kind": [{"hidden": 2.0}, {"one": 0.5, "rank": 3.0}]})
    held = {"name": "head", "block": None, "held": 100, "kind": "a kind"}
    assert Phase(**held, sizes={"hidden": 10.0, "one": 8.0}).bytes == 120
    assert Phase(**held, sizes={"hidden": 1.0, "one": 8.0, "rank": 4.0}).bytes == 116
