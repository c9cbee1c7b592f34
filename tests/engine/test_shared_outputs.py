"""Blocks that return more than a hidden state, and blocks that read it: the same gradients."""

from contextlib import closing
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from architectures import CONFIGS, add_lora, build
from harness import (
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from mlx_lm.tuner.trainer import default_loss

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.outputs import Link
from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.engine.gradients import value_and_grad
from mlx_edgelora.engine.hidden import Slots
from mlx_edgelora.engine.shared import SharedOutputs
from mlx_edgelora.model.lora import without_adapter
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.storage.stores import RamStore

SETTINGS = {
    # K and V of blocks 0 and 1 in blocks 2 to 4; an input of each block made of the embedding.
    "gemma4_text": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 101,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    # K and V of a block in the two after it, by way of the first of them.
    "hunyuan": {
        "num_hidden_layers": 4,
        "attention_bias": False,
        "moe_topk": 1,
        "num_experts": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 3,
        "rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"},
    },
    # An output of block 0 in all others.
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
}
# A tuple whose other entries nobody reads.
UNREAD = SETTINGS["gemma4_text"] | {
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
PLANS = {
    "spilled": {},
    "in memory": {"streamed": False, "spilled": False, "head": "resident"},
    "last two in the loss's graph": {"kept_blocks": 2, "head": "resident"},
    "last four kept, head from disk": {"kept_blocks": 4},
    "all kept": {"kept_blocks": 10, "head": "resident", "streamed": False},
    "tiles": {"tile_tokens": 21, "mlp_bytes": 20_000, "adapters": "paged", "prefetch": False},
    "MLPs by rows": {"tile_tokens": 21, "mlp_bytes": 9000, "mlp_weights": "rows"},
}
# Fast ones; the others are marked slow.
FAST = [
    ("gemma4_text", "spilled"),
    ("gemma4_text", "MLPs by rows"),
    ("gemma4_text", "last two in the loss's graph"),
    ("hunyuan", "tiles"),
    ("hunyuan", "last four kept, head from disk"),
    ("rwkv7", "in memory"),
    ("unread", "spilled"),
]
CASES = [
    pytest.param(name, plan, marks=() if (name, plan) in FAST else pytest.mark.slow)
    for name in (*SETTINGS, "unread")
    for plan in PLANS
]


@pytest.fixture(autouse=True)
def _configs(monkeypatch):
    for name, settings in SETTINGS.items():
        monkeypatch.setitem(CONFIGS, name, settings)


@pytest.fixture(scope="module")
def known(request, tmp_path_factory):
    """A checkpoint, a batch of odd sizes, and what plain MLX makes of it."""
    name = "gemma4_text" if request.param == "unread" else request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, UNREAD if request.param == "unread" else SETTINGS[name])
        folder = save(tmp_path_factory.mktemp("model"), name, True)
    reference, batch = plain(folder), random_batch(3, 19)
    loss, expected = plain_value_and_grad(reference, batch)
    return folder, batch, loss, expected, resolution(reference, batch)


@pytest.mark.parametrize(("known", "plan"), CASES, indirect=["known"])
def test_gradients_equal_plain_autodiff(known, plan):
    folder, batch, loss, expected, moves = known
    with closing(engine(folder, **PLANS[plan])) as ours:
        (got, _), gradients = ours.value_and_grad(batch)
        assert got.item() == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradients, expected, resolution=moves)
        assert ours.loss(batch)[0].item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["hunyuan", "gemma4_text"])
def test_losses_without_and_with_the_adapter(name, tmp_path):
    """A second forward of a block must not replace what later blocks of the first one read."""
    with closing(engine(save(tmp_path, name, False))) as ours:
        assert ours.walk.blocks.share_outputs
        ours.model.eval()
        batch = random_batch()
        adapted, _ = ours.loss(batch)
        with without_adapter(ours.model):
            base, _ = ours.loss(batch)
        found = ours.base_and_adapted_loss(batch)
        assert [loss.item() for loss in found[:2]] == [base.item(), adapted.item()]
        assert abs(base.item() - adapted.item()) > 1e-4


@pytest.mark.parametrize(("name", "count"), [("gemma4_text", 5), ("hunyuan", 4), ("rwkv7", 3)])
def test_what_can_be_tiled(name, count, tmp_path):
    with closing(engine(save(tmp_path, name, True), tile_tokens=8)) as ours:
        assert f"in {count} of " in ours.walk.tiling


@pytest.mark.parametrize("layers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
@pytest.mark.parametrize("name", [pytest.param("hunyuan", marks=pytest.mark.slow), "gemma4_text"])
def test_adapters_in_the_last_blocks_alone(name, layers, tmp_path):
    """Where nothing is trained at or below the block that is read, or in it but not below."""
    folder, batch = save(tmp_path, name, False), random_batch(1, 13)
    reference = plain(folder, num_layers=layers)
    _, expected = plain_value_and_grad(reference, batch)
    for options in ({}, {"tile_tokens": 5}):
        with closing(engine(folder, num_layers=layers, **options)) as ours:
            _, got = ours.value_and_grad(batch)
            assert_same_gradients(got, expected, resolution=resolution(reference, batch))


@pytest.mark.parametrize("name", SETTINGS)
def test_dropout_has_one_mask_per_step(name, spill):
    model = build(name)
    add_lora(model, dropout=0.4)
    arguments = mx.random.randint(0, 101, (2, 12), key=mx.random.key(0)), mx.array([[0, 11]] * 2)
    mx.random.seed(5)
    _, expected = nn.value_and_grad(model, default_loss)(model, *arguments)
    mx.eval(expected)
    mx.random.seed(5)
    _, got = value_and_grad(model, default_loss, store=spill)(model, *arguments)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("plan", ["spilled", pytest.param("tiles", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["gemma4_text", "hunyuan", pytest.param("rwkv7", marks=pytest.mark.slow)]
)
def test_three_steps_of_training_are_those_of_mlx(name, plan, tmp_path):
    folder = save(tmp_path, name, False)
    reference, batches = plain(folder), [random_batch(2, 11, seed=seed) for seed in range(3)]
    optimizers = [optim.AdamW(learning_rate=1e-2) for _ in range(2)]
    options = PLANS[plan] | {"adapters": "resident"}
    with closing(engine(folder, **options)) as ours:
        for batch in batches:
            loss, gradients = plain_value_and_grad(reference, batch)
            optimizers[0].update(reference, gradients)
            (got, _), gradients = ours.value_and_grad(batch)
            optimizers[1].update(ours.model, gradients)
            assert got.item() == pytest.approx(loss, rel=2e-5)


def test_gradients_of_readers_are_added_in_float32():
    model = build("gemma4_text")
    add_lora(model)
    blocks = checked_blocks(model)
    links = [Link(1, leaf) for leaf in blocks.forms[1].read]
    spans = [TokenSpan(0, 4), TokenSpan(4, 7)]
    shared = SharedOutputs(blocks.forms, Slots(RamStore(), 8, 64), spans, 2, 0)
    shape, small = shared.shapes(1)[0], 1 + mx.finfo(mx.bfloat16).eps
    assert shape == (2, 1, 7, 32) and len(links) == 2
    shared.put(1, [mx.ones(shape, mx.bfloat16)] * 2)
    for _ in range(8):
        shared.add(links, [mx.full(shape, small / 8, mx.float32)] * 2)
    for total in shared.cotangents(1):
        assert total.dtype == mx.bfloat16
        assert mx.all(total == mx.array(small, mx.bfloat16)).item()
    shared.forget(1)
    assert not any(array.any().item() for array in shared.cotangents(1))


@pytest.mark.parametrize("known", ["hunyuan"], indirect=True)
def test_a_reader_whose_gradient_is_lost_is_seen(known, monkeypatch):
    folder, batch, _, expected, moves = known
    monkeypatch.setattr(SharedOutputs, "add", lambda *args: None)
    with closing(engine(folder)) as ours:
        _, gradients = ours.value_and_grad(batch)
        with pytest.raises(AssertionError):
            assert_same_gradients(gradients, expected, resolution=moves)


def test_inputs_made_of_embeddings_are_checked_without_reading_these(tmp_path):
    model, file = build("gemma4_text"), tmp_path / "weights.safetensors"
    add_lora(model)
    tables = [model.model.embed_tokens, model.model.embed_tokens_per_layer]
    mx.save_safetensors(str(file), {str(i): table.weight for i, table in enumerate(tables)})
    lazy, whole = mx.load(str(file)), file.read_bytes()
    for i, table in enumerate(tables):
        table.weight = lazy[str(i)]
    file.write_bytes(b"")  # whoever reads it now gets an error
    checked_blocks(model)
    file.write_bytes(whole[:-4] + b"last")
    last = mx.array(list(b"last"), mx.uint8).view(mx.float32)
    assert sum((table.weight == last).sum().item() for table in tables) == 1, "was read before"


def test_the_planner_counts_what_blocks_are_given_and_give_each_other():
    model = build("gemma4_text")
    add_lora(model)
    shape = shape_of(checked_blocks(model), 101)
    assert shape.arguments == 5 * 32  # an input of 32 entries for each block
    assert shape.shared == 2 * (16 + 32)  # K and V of a block with a window and of one without
    sizes = BatchShape(1, 100, 40)
    costs = [Memory(shape, sizes, Plan(inputs=where)) for where in ("file", "memory")]
    without = [Memory(replace(shape, arguments=0, shared=0), sizes, cost.plan) for cost in costs]
    more = [cost.base - other.base for cost, other in zip(costs, without, strict=True)]
    assert more == [100 * 160 * 4, 100 * (160 * 4 + 96 * 8)]
