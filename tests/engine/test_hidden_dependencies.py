"""What a part of a batch, a tile or a compiled function might take for granted."""

import gc
from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import add_lora, build
from harness import (
    Batch,
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    save,
)
from mlx_lm.models import base
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.trainer import default_loss
from toy import WIDTH
from toy import Toy as ToyModel

from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.gradients import gradient_tree, value_and_grad
from mlx_edgelora.engine.walk import Pass, Walk
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora as adapt
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.planner.plan import MIB, Plan


def test_a_part_of_a_batch_has_rows_of_the_batchs_length(tmp_path):
    """Frequencies that depend on how long the text is are those of all of it."""
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 9}
    folder, labelled = save(tmp_path, "llama", True, **scaling), np.zeros((2, 70), bool)
    labelled[0, 3:20] = labelled[1, 40:70] = True
    tokens = np.random.RandomState(0).randint(0, 101, (2, 71)).astype(np.int32)
    batch = Batch(tokens, labelled)
    loss, expected = plain_value_and_grad(plain(folder), batch)
    with closing(engine(folder, micro_batches=2)) as ours:
        (got_loss, _), got = ours.value_and_grad(batch)
    assert got_loss.item() == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(got, expected)


class Scaled(nn.Module):
    """Attention whose output is scaled by an argument."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def __call__(self, x, mask=None, cache=None, scale=None):
        q, k, v = mx.split(self.qkv(x)[:, None], 3, axis=-1)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.3, mask=mask)
        out = self.out(out[:, 0])
        return x + (out if scale is None else out * scale)


@pytest.mark.parametrize("kind", ["of each entry", "of each token of each row"])
@pytest.mark.parametrize("plan", [Plan(), Plan(tile_tokens=4)], ids=["whole", "tiles"])
def test_an_argument_that_long_texts_alone_have(plan, kind):
    """The trial on few tokens has seen None: it is cut into tokens only if it can be."""

    class Model(ToyModel):
        def __init__(self):
            super().__init__(Scaled)

        def loop(self, h):
            mask, scale = create_attention_mask(h), None
            if h.shape[1] > 8:
                shape = (WIDTH,) if kind == "of each entry" else (*h.shape[:2], 1)
                scale = 1 + 0.5 * mx.sin(mx.arange(int(np.prod(shape)))).reshape(shape)
            for layer in self.layers:
                h = layer(h, mask, scale=scale)
            return h

    model, tokens = Model(), mx.arange(1, 27).reshape(2, 13) % 11
    add_lora(model, keys=["qkv", "out"])
    rows = mx.array([2, 5, 6, 12, 14, 25])

    def loss():
        return mx.logsumexp(model(tokens).reshape(-1, 11)[rows], axis=-1).mean()

    _, expected = nn.value_and_grad(model, loss)()
    walk = Walk(model, plan=plan)
    with walk.forward(lambda: model(tokens), rows=rows) as state:

        def tail(hidden):
            with walk.tail(state, hidden):
                return mx.logsumexp(model(mx.zeros((1, rows.size), mx.int32)), axis=-1).mean()

        state.cotangent = mx.grad(tail)(state.hidden)
        got = {name: value for more in walk.backward(state) for name, value in more.items()}
    assert_same_gradients(gradient_tree(model, got), expected)


def test_a_compiled_function_sees_changed_settings_of_a_block(compiles):
    model = build("llama", vocab_size=101)
    add_lora(model, keys=["self_attn.q_proj"])
    tokens = mx.random.randint(0, 101, (2, 18))
    gradient = value_and_grad(model, default_loss, compiled=True)
    for scale in (3.0, 9.0):
        for layer in model.layers:
            layer.self_attn.q_proj.scale = scale
        lengths = mx.array([[3, 17], [0, 12]])
        (loss, _), expected = nn.value_and_grad(model, default_loss)(model, tokens, lengths)
        (got_loss, _), got = gradient(model, tokens, lengths)
        assert got_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert_same_gradients(got, expected)


def test_a_compiled_tail_keeps_nothing_of_a_batch(tmp_path, compiles):
    folder = save(tmp_path, "llama", True)
    lazy = open_model(str(folder), streamed=False, quantize=None, cache=folder / "cache")
    adapt(lazy.model, -1, rank=4, scale=3.0)
    resident = {"streamed_blocks": 0, "head": "resident", "inputs": "memory"}
    plan = Plan(kept_blocks=3, loss_bytes=MIB, **resident)
    with build_engine(lazy, plan, Settings(folder)) as ours:

        def sink(gradients):
            raise KeyError("stop here")

        with pytest.raises(KeyError, match="stop here"):
            ours.backward(random_batch(), sink)
        ours.value_and_grad(random_batch(seed=1))
        gc.collect()
        assert not [found for found in gc.get_objects() if isinstance(found, Pass)]


@pytest.mark.parametrize(
    "plan",
    [{}, {"inputs": "memory"}, {"tile_tokens": 7}, {"kept_blocks": 2}],
    ids=["whole", "inputs in memory", "tiles", "kept"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text"])
def test_the_next_segment_is_built_while_one_is_computed(name, plan, tmp_path, monkeypatch):
    """As on a GPU. What was read is overwritten as soon as it may be."""
    folder = save(tmp_path, name, True, num_hidden_layers=4)
    buffer = StreamedWeights._release

    def released(weights):
        before = {id(kept) for free in weights._free.values() for kept in free}
        buffer(weights)
        for free in weights._free.values():
            for kept in free:
                if id(kept) not in before:
                    for view in kept.views.values():
                        view[:] = b"\xff" * len(view)

    monkeypatch.setattr(StreamedWeights, "_release", released)
    batches = [random_batch(), random_batch(1, 13, seed=1)]
    reference = plain(folder)
    with closing(engine(folder, **plan)) as ours:
        ours.walk.ahead = True
        for batch in batches:
            loss, expected = plain_value_and_grad(reference, batch)
            (got_loss, _), got = ours.value_and_grad(batch)
            assert got_loss.item() == pytest.approx(loss, rel=1e-5)
            assert_same_gradients(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 3])
def test_batches_of_other_label_counts_leave_nothing(tmp_path, compiles, kept):
    """What is compiled for one number of labelled tokens serves all that are padded to it."""
    folder, tokens = save(tmp_path, "llama", True), 64
    choices = {"head": "resident", "streamed": False, "kept_blocks": kept}

    def batch(labels):
        ids = np.random.RandomState(labels).randint(0, 101, (1, tokens + 1)).astype(np.int32)
        return Batch(ids, np.arange(tokens)[None] < labels)

    with closing(engine(folder, compiled=True, **choices)) as ours:

        def active_after(labels):
            ours.value_and_grad(batch(labels))
            mx.synchronize()
            gc.collect()
            return mx.get_active_memory()

        for labels in (1, 33):  # both numbers that they are padded to
            active_after(labels)
        functions = ours.walk.compiled_functions
        assert len({active_after(labels) for labels in range(3, 63, 3)}) == 1
        assert ours.walk.compiled_functions == functions > 0
