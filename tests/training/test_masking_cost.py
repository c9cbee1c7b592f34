"""What masking saves: products, and arrays that grow with the tokens that carry a label."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import add_lora, build
from harness import Batch, engine, save
from mlx_lm.models import base
from peaks import above, highest, lowest

from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.losses.exact import CrossEntropy

pytestmark = pytest.mark.slow


def labelled(rows, tokens, count, vocabulary=101) -> Batch:
    """A batch with `count` labels, scattered."""
    rng = np.random.RandomState(0)
    mask = np.zeros(rows * tokens, bool)
    mask[rng.permutation(mask.size)[:count]] = True
    numbers = rng.randint(0, vocabulary, (rows, tokens + 1)).astype(np.int32)
    return Batch(numbers, mask.reshape(rows, tokens))


# --- work -----------------------------------------------------------------------------------


@pytest.fixture
def spied(tmp_path):
    """An engine whose head counts: tokens that reach the final norm, entries of its products."""
    ours, counts = engine(save(tmp_path, "granite", True), loss=CrossEntropy(16_384)), {}
    final_norm, logits_transform = ours.head.final_norm, ours.head.logits_transform

    def count(name, function):
        def counted(x):
            counts[name] = counts.get(name, 0) + (x.shape[0] if name == "tokens" else x.size)
            return function(x)

        return counted

    ours.head.final_norm, ours.head.logits_transform = (
        count("tokens", final_norm),
        count("entries", logits_transform),
    )

    def run(share):
        counts.clear()
        ours.value_and_grad(labelled(2, 20, int(40 * share)))
        return dict(counts)

    yield run
    ours.close()


@pytest.mark.parametrize("share", [0.025, 0.3, 0.7])
def test_products_with_the_head_are_made_for_labelled_tokens_only(spied, share):
    """All is counted twice, the second time to be differentiated; and the label's own logit."""
    everything = spied(1.0)
    assert everything == {"tokens": 2 * 40, "entries": 2 * 40 * (101 + 1)}
    got = spied(share)
    assert got == {name: round(share * count) for name, count in everything.items()}


def test_the_last_mlp_is_computed_for_labelled_tokens_only(tmp_path, monkeypatch):
    ours, seen = engine(save(tmp_path, "llama", True)), []
    assert ours.walk.computes_rows_only
    kind = type(ours.model.layers[0].mlp)
    call = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda self, x: seen.append(x.size // x.shape[-1]) or call(self, x)
    )
    ours.value_and_grad(labelled(2, 20, 12))
    # Keys and values end the first of its two calls before the MLP.
    assert seen == [40, 40, 12, 12, 40, 40]
    seen.clear()
    ours.loss(labelled(2, 20, 12))
    assert seen == [40, 40, 12]
    ours.close()


# --- memory -------------------------------------------------------------------------------


TOKENS, WIDTH = 2000, 256


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_memory_of_the_head_that_grows_with_tokens_falls_with_the_labels(
    streamed, tmp_path, memory
):
    """Tiles take the same bytes whatever the labels; 20 tokens, less than a tile, stand for them.

    Beside the tiles there are the hidden states themselves, the normed ones and the running
    sum, and then the gradient: three arrays of labels x width at once where MLX runs ahead.
    """
    small = {"hidden_size": WIDTH, "intermediate_size": 32, "vocab_size": 1024}
    ours = engine(save(tmp_path, "llama", True, num_hidden_layers=1, **small), streamed=streamed)
    hidden, labels = mx.random.normal((TOKENS, WIDTH)), mx.random.randint(0, 1024, (TOKENS,))

    def peak(count):
        rows, some = mx.contiguous(hidden[:count]), labels[:count]
        mx.eval(rows, some)
        loss = CrossEntropy(2**16)
        return rows.nbytes + highest(
            lambda: above(lambda: loss.value_and_grad(rows, ours.head, some))
        )

    tiles, masked, unmasked = peak(20), peak(3 * TOKENS // 10), peak(TOKENS)
    ours.close()
    assert unmasked - tiles > 2.5 * hidden.nbytes
    assert 0.25 <= (masked - tiles) / (unmasked - tiles) <= 0.35


def test_the_head_keeps_no_hidden_states(tmp_path, memory):
    """Not even until Python collects its cycles: a class made for a call is one."""
    ours = engine(save(tmp_path, "llama", True))
    hidden, labels = mx.random.normal((500, 64)), mx.zeros((500,), mx.int32)
    mx.eval(hidden, labels)
    ours.head.final_norm(hidden[:2])
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        for function in (
            lambda: mx.eval(ours.head.final_norm(hidden)),
            lambda: CrossEntropy(2**16).value(hidden, ours.head, labels),
        ):
            for _ in range(3):
                function()
            mx.synchronize()
            assert mx.get_active_memory() - before < hidden.nbytes // 10
    finally:
        gc.enable()
        ours.close()


@pytest.mark.parametrize("places", ["scattered", "one run"])
def test_peak_of_the_last_block_falls_with_the_labels(places, memory):
    """A model of one block, its forward and backward: input and keys of all tokens remain."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8}
    model = build("llama", num_hidden_layers=1, **shape)
    add_lora(model)
    walk, tokens = Walk(model), mx.zeros((1, 400), mx.int32)
    assert walk.computes_rows_only

    def run(rows):
        with walk.forward(lambda: model(tokens), rows=rows) as state:
            state.cotangent, state.hidden = mx.ones(state.hidden.shape), None
            for _ in walk.backward(state):
                pass

    run(mx.array([0]))
    rows = {"scattered": mx.arange(0, 400, 3)[:120], "one run": mx.arange(250, 370)}[places]
    mx.eval(rows)
    unmasked = highest(lambda: above(lambda: run(mx.arange(400))))
    assert lowest(lambda: above(lambda: run(rows)), 0.4 * unmasked) < 0.4 * unmasked


# --- compiled -----------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention alone: to compile more, a CPU calls a C++ compiler for half a minute."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.rope = nn.RoPE(8)

    def __call__(self, x, mask=None, cache=None):
        q, k, v = (
            part.reshape(*x.shape[:2], 2, 8).swapaxes(1, 2)
            for part in mx.split(self.qkv(x), 3, axis=-1)
        )
        offset = 0 if cache is None else cache.offset
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.35, mask=mask)
        return x + self.out(out.swapaxes(1, 2).reshape(x.shape))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.layers = [Attending(), Attending()]
        self.embed.freeze()
        self.head.freeze()

    def __call__(self, tokens):
        h = self.embed(tokens)
        mask = base.create_attention_mask(h)
        for layer in self.layers:
            h = layer(h, mask)
        return self.head(h)


def test_a_compiled_backward_knows_the_rows_of_its_own_batch(compiles):
    """As many labels at other places: what was compiled for the first must not serve."""
    model, tokens = Model(), mx.random.randint(0, 11, (2, 9))
    walks = [Walk(model, compiled=compiled) for compiled in (False, True)]

    def gradients(walk, rows):
        with walk.forward(lambda: model(tokens), rows=mx.array(rows)) as state:
            state.cotangent = mx.random.normal(state.hidden.shape, key=mx.random.key(1))
            found = {}
            for more in walk.backward(state):
                found |= more
        return found

    for rows in ([0, 4, 9], [1, 7, 17], [2, 3, 12, 13], list(range(18))):
        expected, got = (gradients(walk, rows) for walk in walks)
        assert len(expected) == 4
        for name, value in expected.items():
            assert mx.linalg.norm(value).item() > 0
            assert mx.allclose(got[name], value, rtol=1e-5, atol=1e-6).item(), name
    # Forward of all tokens, for both blocks, and of some; backward of the lower block, and of the
    # last one for some tokens and for all, whose gradient goes on.
    assert [walk.compiled_functions for walk in walks] == [0, 5]
