"""Last blocks that are kept, alone or as one graph with the loss: nothing is computed twice."""

from contextlib import closing

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
from peaks import highest, lowest, peak

from mlx_edgelora.losses.exact import CrossEntropy


def check(folder, batch, **options):
    lora = {key: options[key] for key in ("keys", "num_layers", "dropout") if key in options}
    reference = plain(folder, **lora)
    mx.random.seed(3)
    loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, **options)) as ours:
        mx.random.seed(3)
        (got_loss, _), got = ours.value_and_grad(batch)
    assert got_loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))


HEADS = pytest.mark.parametrize("head", ["streamed", "resident"])


@HEADS
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 1, "kept_blocks": 2},
        {"kept_blocks": 3, "keys": ["model.embed_tokens", "self_attn.q_proj"]},
        {"kept_blocks": 1, "keys": ["model.embed_tokens", "self_attn.q_proj"]},
        {"kept_blocks": 2, "keys": ["lm_head", "mlp.down_proj"]},
        {"kept_blocks": 2, "streamed": False, "spilled": False},
        {"kept_blocks": 1, "inputs": "memory"},
        {"inputs": "memory"},
        {"streamed_blocks": 1, "kept_blocks": 1},
        {"streamed_blocks": 2},
        {"micro_batches": 2},
        {"micro_batches": 2, "kept_blocks": 2, "keys": ["lm_head", "mlp.down_proj"]},
        {"micro_batches": 9, "keys": ["model.embed_tokens", "self_attn.q_proj"]},
        {"inputs": "memory", "tile_tokens": 4},
    ],
    ids=str,
)
def test_every_way_gives_the_same_gradients(options, head, tmp_path):
    batch = random_batch(tokens=13)
    check(save(tmp_path, "llama", quantized=True), batch, head=head, **options)


@HEADS
def test_dropout_draws_the_masks_of_plain_mlx(head, tmp_path):
    folder = save(tmp_path, "llama", quantized=False)
    check(folder, random_batch(), kept_blocks=2, dropout=0.3, head=head)


@HEADS
def test_kept_blocks_run_once(head, tmp_path, monkeypatch):
    calls, folder = [], save(tmp_path, "llama", quantized=False)
    with closing(engine(folder, kept_blocks=2, head=head)) as ours:
        for index, block in enumerate(ours.model.layers):
            kind = type(block)

            def called(self, *args, kind=kind, index=index, **kwargs):
                calls.append(index)
                return kind.__call__(self, *args, **kwargs)

            object.__setattr__(block, "__class__", type("Counted", (kind,), {"__call__": called}))
        ours.value_and_grad(random_batch())  # trials of what can be done come first
        calls.clear()
        ours.value_and_grad(random_batch())
    assert calls == [0, 1, 2, 0]


def test_kept_blocks_are_compiled(tmp_path, compiles):
    folder = save(tmp_path, "llama", quantized=True)
    with closing(engine(folder, kept_blocks=3, compiled=True)) as ours:
        for seed in range(2):
            batch = random_batch(seed=seed)
            (loss, _), got = ours.value_and_grad(batch)
            expected_loss, expected = plain_value_and_grad(plain(folder), batch)
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected)
        # The first, those between, and the last one, which is computed for labelled tokens.
        assert ours.walk.compiled_functions == 3


@pytest.mark.slow
@pytest.mark.alone
def test_a_head_on_disk_is_not_read_whole_beside_kept_blocks(tmp_path):
    folder = save(tmp_path, "llama", quantized=False, vocab_size=20000)
    batch, matrix = random_batch(), 20000 * 64 * 4

    def stepped(head):
        options = {"kept_blocks": 2, "streamed_blocks": 1, "loss": CrossEntropy(2**16)}
        with closing(engine(folder, head=head, **options)) as ours:
            ours.value_and_grad(batch)
            return peak(lambda: ours.value_and_grad(batch))

    whole = highest(lambda: stepped("resident"))
    assert lowest(lambda: stepped("streamed"), whole - 0.8 * matrix) < whole - 0.8 * matrix


def test_a_tail_of_all_blocks_is_one_compiled_function(tmp_path, compiles):
    folder = save(tmp_path, "llama", quantized=True, num_hidden_layers=1)
    batches = [random_batch(seed=seed) for seed in range(2)]
    options = {"streamed": False, "head": "resident", "kept_blocks": 1, "compiled": True}
    with closing(engine(folder, **options)) as ours:
        for batch in batches:
            (loss, _), got = ours.value_and_grad(batch)
            expected_loss, expected = plain_value_and_grad(plain(folder), batch)
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected)
        assert ours.walk.compiled_functions == 1


def test_a_graph_that_mlx_cannot_compile_is_built_anew(tmp_path, compiles, monkeypatch):
    """Two slices of an MLP for two chunks of tokens: mx.compile of 0.32.4 loses its way."""
    monkeypatch.setattr("mlx_edgelora.layers.mlp.TOKENS", 8)
    folder = save(tmp_path, "llama", quantized=True, intermediate_size=256)
    batch, reference = random_batch(tokens=20), plain(folder)
    loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, mlp_bytes=1, compiled=True)) as ours:
        (got_loss, _), got = ours.value_and_grad(batch)
    assert got_loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(got, expected, resolution=resolution(reference, batch))
