"""What the host does for a step: evaluations it waits for, and operations of its graph.

Both are the same on every machine. Shapes are small; tokens, tiles, slices of an MLP and tiles of
the head are as many as at the shape of Llama-3.2-3B with 1024 tokens, 30 % labelled.
"""

import re
from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import add_lora, build
from harness import engine, random_batch, save
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_edgelora.blocks import attention as attention_hook
from mlx_edgelora.blocks import norms as norms_hook
from mlx_edgelora.engine import tail
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.layers import attention as attention_layer
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.model.head import ModelHead, ResidentRows, find_head, frozen_matrix
from mlx_edgelora.planner.plan import Plan

TOKENS = 1024


@pytest.fixture
def evaluations(monkeypatch):
    """Counts calls of `mx.eval` and `mx.async_eval`."""
    calls = []
    for name in ("eval", "async_eval"):
        original = getattr(mx, name)
        monkeypatch.setattr(
            mx, name, lambda *args, original=original: calls.append(1) or original(*args)
        )
    return calls


def evaluations_a_block(folder, evaluations, **options):
    """Of two more blocks: what a step evaluates outside of blocks does not count."""
    counts = []
    for blocks in (2, 4):
        made = save(folder / str(blocks), "llama", True, num_hidden_layers=blocks)
        batch = random_batch(1, TOKENS, share=0.3)
        with closing(engine(made, **options)) as ours:
            ours.value_and_grad(batch)  # the first one also tries what can be tiled
            evaluations.clear()
            ours.backward(batch, lambda gradients: None)
            counts.append(len(evaluations))
    return (counts[1] - counts[0]) / 2


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="waiting for a segment counts there")
def test_a_streamed_block_is_evaluated_a_few_times(tmp_path, evaluations):
    assert evaluations_a_block(tmp_path, evaluations) <= 6


def test_a_block_by_tiles_is_evaluated_for_each_tile(tmp_path, evaluations):
    found = evaluations_a_block(tmp_path, evaluations, tile_tokens=256, prefetch=False)
    assert found <= 40


# --- operations ---------------------------------------------------------------------------


def operations(folder, *arrays):
    mx.export_to_dot(str(folder / "graph.dot"), *arrays)
    return len(re.findall(r"shape ?= ?rectangle", (folder / "graph.dot").read_text()))


def shape(blocks):
    return {"num_hidden_layers": blocks, "vocab_size": 2048, "tie_word_embeddings": True}


def theirs(folder, blocks):
    model = build("llama", **shape(blocks))
    model.freeze()
    linear_to_lora_layers(model, blocks, {"rank": 4, "scale": 3.0, "dropout": 0.0})
    model.train()
    tokens = mx.zeros((1, TOKENS + 1), mx.int32)
    (loss, _), gradients = nn.value_and_grad(model, default_loss)(
        model, tokens, mx.array([[700, TOKENS]])
    )
    return operations(folder, loss, *[value for _, value in tree_flatten(gradients)])


def ours(folder, blocks, monkeypatch):
    model = build("llama", **shape(blocks))
    add_lora(model)
    plan = Plan(kept_blocks=blocks, streamed_blocks=0, head="resident", inputs="memory")
    walk = Walk(model.train(), plan=plan)
    module = find_head(walk.blocks)
    head = ModelHead(walk.blocks, module, ResidentRows(frozen_matrix(module)))
    # As many tiles as those of 640 MiB are of a vocabulary of 128,256.
    loss = CrossEntropy(12 * (2048 // 17) ** 2)
    made = Engine(model, walk, head, DiskMeter(), loss)
    made.set_plan(plan)
    found = []

    class Counted:
        def __getattr__(self, name):
            return getattr(mx, name)

        def eval(self, *trees):
            arrays = [a for _, a in tree_flatten(list(trees)) if isinstance(a, mx.array)]
            found.append(operations(folder, *arrays))
            mx.eval(*trees)

    monkeypatch.setattr(tail, "mx", Counted())
    made.value_and_grad(random_batch(1, TOKENS, share=0.3))
    monkeypatch.undo()
    return found[0]


def test_with_no_limit_a_step_has_no_more_operations_than_mlx_lms(tmp_path, monkeypatch):
    """As on a GPU, where attention, norms and products are MLX's own kernels."""

    def on_gpu():
        for module in (attention_hook, attention_layer, norms_hook):
            monkeypatch.setattr(module, "TILE_BYTES", 2**40)

    counts = []
    for blocks in (2, 4):
        on_gpu()
        counts.append((theirs(tmp_path, blocks), ours(tmp_path, blocks, monkeypatch)))
    (other, mine), (more_other, more_mine) = counts
    block = (more_other - other) / 2, (more_mine - mine) / 2
    whole = [first + 26 * each for first, each in zip((other, mine), block, strict=True)]
    assert whole[1] <= whole[0], whole
