"""Labels on some tokens only: the gradients of a masked loss, without the work it drops."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGS, EACH_KIND, relative_error
from harness import (
    Batch,
    allowed,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from mlx.utils import tree_flatten

from mlx_edgelora import data
from mlx_edgelora.engine import parts
from mlx_edgelora.engine.functions import rows_of
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.exact import CrossEntropy, tile_shape
from mlx_edgelora.losses.head import MatrixHead


def batch(rows, tokens, labelled, seed=0) -> Batch:
    """A random batch with labels where `labelled` says, a function of a bool [rows, tokens]."""
    made = random_batch(rows, tokens, seed=seed)
    made.mask[:] = False
    labelled(made.mask)
    return made


def fill(*places):
    def labelled(mask):
        for place in places:
            mask[place] = True

    return labelled


def scattered(mask):
    mask[:] = np.random.RandomState(mask.size).rand(*mask.shape) < 0.4
    mask[-1, -2] = True


# Lengths on both sides of the windows (5) and original lengths (8) of the configurations.
BATCHES = {
    "one label": batch(1, 17, fill((0, 11)), 1),
    "one label of three rows": batch(3, 9, fill((1, 6)), 2),
    "last token only": batch(3, 11, fill((slice(None), -1)), 3),
    "scattered": batch(3, 17, scattered, 4),
    "one run": batch(1, 13, fill((0, slice(4, 12))), 5),
    "a run of each length": batch(
        3, 12, fill((0, slice(1, 4)), (1, slice(0, 12)), (2, slice(10, 12))), 6
    ),
    "a row without labels": batch(3, 10, fill((0, slice(3, 5)), (2, [1, 4, 9])), 7),
    "all tokens": batch(3, 6, fill(slice(None)), 8),
    "short of the window": batch(1, 4, fill((0, slice(2, 4))), 9),
}


def norms_of(gradients) -> dict[str, float]:
    return {n: mx.linalg.norm(value.reshape(-1)).item() for n, value in tree_flatten(gradients)}


def largest(gradients) -> float:
    return max(norms_of(gradients).values())


def assert_same(got, expected, nothing=(), moves=None) -> None:
    """Every array within 1e-5 of its own norm and of a hundredth of the largest one.

    Of the scores, with few labels, little remains of large terms that cancel. None is zero
    in the reference but those named in `nothing`. With what `resolution` gives, an array may be
    off by what float32 does not resolve, see `assert_same_gradients`.
    """
    norms, most = norms_of(expected), largest(expected)
    got, expected = dict(tree_flatten(got)), dict(tree_flatten(expected))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert norms[name] > 1e-4 * most or name in nothing, f"{name}: of the reference is nothing"
        difference = mx.linalg.norm((got[name] - value).reshape(-1)).item()
        bound = allowed(1e-5 * (norms[name] + most / 100), difference, name, moves)
        assert difference <= bound, f"{name}: {difference / bound:.2f} times the bound"


def check(ours, model, made):
    expected_loss, expected = plain_value_and_grad(model, made)
    (loss, count), got = ours.value_and_grad(made)
    assert count == made.mask.sum()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same(got, expected, moves=resolution(model, made))


# Every architecture, and those whose block of another kind is the last of four.
MODELS = [(name, 3) for name in CONFIGS] + [
    ("gemma3_text", 4),
    ("cohere2", 4),
    ("smollm3", 4),
    ("qwen3_next", 4),
]
# Attention of its own or of latents, and a recurrence.
WHOLE = {("gemma2", 3), ("deepseek_v3", 3), ("qwen3_next", 3), ("olmo_hybrid", 3)}


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param(name, layers, marks=() if name in EACH_KIND else pytest.mark.slow)
        for name, layers in MODELS
    ],
)
def test_gradients_equal_autodiff_of_the_masked_loss(name, layers, quantized, tmp_path):
    """Of a model's batches its floats meet some, and its packed weights others."""
    turn = MODELS.index((name, layers)) + quantized
    folder = save(tmp_path, name, quantized, num_hidden_layers=layers)
    ours, model = engine(folder, loss=CrossEntropy(16_384)), plain(folder)
    assert ours.walk.computes_rows_only == ((name, layers) not in WHOLE)
    try:
        for made in list(BATCHES.values())[turn % 3 :: 3]:
            check(ours, model, made)
    finally:
        ours.close()


@pytest.mark.parametrize("prefetch", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize(("name", "layers"), [("llama", 3), ("gemma3_text", 3), ("qwen3_next", 4)])
def test_by_tiles_of_tokens(name, layers, prefetch, tmp_path):
    """Behind the last label a tile has no queries, and if it is causal nobody sees its keys."""
    folder = save(tmp_path, name, True, num_hidden_layers=layers)
    ways = {"tile_tokens": 6, "prefetch": prefetch, "spilled": False}
    ours, model = engine(folder, loss=CrossEntropy(16_384), **ways), plain(folder)
    assert ours.walk.computes_rows_only
    assert ours.walk.tile_choice(layers - 1, 7).possible
    for made in ("one label", "one label of three rows", "a row without labels"):
        check(ours, model, BATCHES[made])
    ours.close()


FILLED = {
    "whole": {},
    "kept": {"kept_blocks": 2},
    "tiles": {"tile_tokens": 6},
    "micro-batches": {"micro_batches": 2, "kept_blocks": 1},
}


@pytest.mark.parametrize("way", FILLED)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_filled_up_with_tokens_that_carry_no_label(name, way, tmp_path):
    """As for compiled functions, so that there are few shapes; they have no part in the loss."""
    folder = save(tmp_path, name, True)
    ours = engine(folder, loss=CrossEntropy(16_384), compiled=True, **FILLED[way])
    assert ours.walk.is_compiled  # as far as MLX is asked: it does not here
    model = plain(folder)
    for made in ("one label", "scattered", "a row without labels", "all tokens"):
        check(ours, model, BATCHES[made])
    ours.close()


def test_filled_up_there_are_few_numbers_of_rows():
    sizes = set()
    for count in range(1, 301):
        made = batch(3, 100, fill(), count)
        made.mask.reshape(-1)[np.random.RandomState(count).permutation(300)[:count]] = True
        (part,) = parts.labelled_parts(made, 1, fills=True)
        rows, weights = np.array(part.rows), np.array(part.weights)
        assert (np.diff(rows) > 0).all()
        assert part.count == count
        assert set(np.flatnonzero(made.mask)) == set(rows[weights > 0])
        assert weights[weights > 0] == pytest.approx(1 / count)
        assert np.array_equal(part.labels, made.labels().reshape(-1)[rows])
        sizes.add(rows.size)
    assert len(sizes) <= parts.FILLED


@pytest.mark.parametrize(("name", "layers"), MODELS, ids=str)
def test_first_token_only(name, layers, tmp_path):
    """It sees itself alone: without sinks its scores have no gradient."""
    folder = save(tmp_path, name, False, num_hidden_layers=layers)
    made, model = batch(3, 8, fill((slice(None), 0)), 10), plain(folder)
    _, expected = plain_value_and_grad(model, made)
    ours = engine(folder, loss=CrossEntropy(16_384))
    (_, count), got = ours.value_and_grad(made)
    ours.close()
    assert count == 3
    nothing = {n for n, norm in norms_of(expected).items() if norm < 1e-5 * largest(expected)}
    if name == "llama":
        scores = {n for n in norms_of(expected) if "q_proj" in n or "k_proj" in n}
        assert nothing == scores
    assert_same(got, expected, nothing, resolution(model, made))


def test_a_gradient_of_the_wrong_row_is_seen(tmp_path):
    """What the comparisons above would say if one label stood at another token."""
    folder = save(tmp_path, "llama", False)
    ours, model = engine(folder), plain(folder)
    made, moved = batch(3, 17, scattered, 4), batch(3, 17, scattered, 4)
    moved.mask[-1, -2:] = False, True
    ours.value_and_grad(moved)
    _, expected = plain_value_and_grad(model, made)
    _, got = ours.value_and_grad(moved)
    ours.close()
    with pytest.raises(AssertionError, match=r"times the bound"):
        assert_same(got, expected)


# --- bit for bit, and what is not ----------------------------------------------------------

# A token's gradient is the sum over tiles of the head, divided by the number of labels:
# 16 and 64 divide without rounding. A product may round differently where a token stands at
# another place of a tile, or beside others; so tiles of one token, or of the same eight.
ALIGNED = [*range(8, 16), *range(40, 48)]
SCATTERED = sorted(np.random.RandomState(3).permutation(64)[:16].tolist())


def kept_and_unmasked(tile_bytes, rows):
    """Gradients of kept hidden states with and without the others, times labels."""
    hidden, head = mx.random.normal((64, 32)), MatrixHead(mx.random.normal((50, 32)))
    labels, rows, loss = mx.random.randint(0, 50, (64,)), mx.array(rows), CrossEntropy(tile_bytes)
    _, kept = loss.value_and_grad(hidden[rows], head, labels[rows])
    _, whole = loss.value_and_grad(hidden, head, labels)
    return 16 * kept.hidden, 64 * whole.hidden[rows]


@pytest.mark.parametrize(
    ("tile_bytes", "chunk", "rows"), [(1, 1, SCATTERED), (3000, 8, ALIGNED)], ids=["one", "eight"]
)
def test_rows_kept_are_the_unmasked_ones_bit_for_bit(tile_bytes, chunk, rows):
    shapes = {tile_shape(tile_bytes, 32, tokens, 50) for tokens in (16, 64)}
    assert {tokens for _, tokens in shapes} == {chunk}
    assert len(shapes) == 1
    kept, unmasked = kept_and_unmasked(tile_bytes, rows)
    assert mx.array_equal(kept, unmasked).item()


def test_in_other_tiles_rows_kept_are_the_unmasked_ones_to_rounding():
    kept, unmasked = kept_and_unmasked(10**6, SCATTERED)
    assert relative_error(kept, unmasked) < 1e-6


def walked(ours, made, rows, cotangent):
    """Hidden states and gradients of one pass for some rows; for all where they are None."""
    tokens = mx.array(made.inputs())
    with ours.walk.forward(lambda: ours.model(tokens), rows=rows) as state:
        hidden, state.hidden, state.cotangent = state.hidden, None, cotangent
        gradients = {}
        for more in ours.walk.backward(state):
            gradients |= more
    return hidden, gradients


@pytest.mark.parametrize(("name", "bits"), [("gemma2", True), ("llama", False)])
def test_a_whole_last_block_is_the_unmasked_one_bit_for_bit(name, bits, tmp_path):
    """Where it is computed for labelled tokens only, products have other shapes: rounding."""
    ours, made = engine(save(tmp_path, name, True)), batch(2, 17, scattered, 3)
    rows = mx.array(np.flatnonzero(made.mask))
    cotangent = mx.random.normal((1, rows.size, 64))
    hidden, gradients = walked(ours, made, rows, cotangent)
    everywhere = mx.zeros((34, 64))
    everywhere[rows] = cotangent[0]
    whole, expected = walked(ours, made, None, everywhere.reshape(2, 17, 64))
    ours.close()
    assert gradients.keys() == expected.keys()
    pairs = [(hidden, rows_of(whole, rows)), *((gradients[n], expected[n]) for n in expected)]
    assert all(mx.array_equal(a, b).item() for a, b in pairs) == bits
    assert all(relative_error(a, b) < 1e-5 for a, b in pairs)


# --- dropout --------------------------------------------------------------------------------


def dropout_layers(block):
    return [module for module in block.modules() if isinstance(module, nn.Dropout)]


def test_dropout_in_the_last_block_computes_every_token(tmp_path):
    """Training mode is asked about for every batch."""
    folder, made = save(tmp_path, "llama", True), batch(3, 17, scattered, 4)
    ours, model = engine(folder, dropout=0.4), plain(folder, dropout=0.4)
    for training in (True, False, True):
        ours.model.train(training)
        model.train(training)
        assert ours.walk.computes_rows_only == (not training)
        mx.random.seed(5)
        _, wanted = plain_value_and_grad(model, made)
        following = mx.random.uniform().item()
        mx.random.seed(5)
        _, got = ours.value_and_grad(made)
        assert mx.random.uniform().item() == following  # the generator moved as far
        assert_same(got, wanted)
    ours.close()


def test_dropout_in_other_blocks_leaves_the_last_one_spared(tmp_path):
    folder, made = save(tmp_path, "qwen2", False), batch(3, 17, scattered, 4)
    ours, model = engine(folder, dropout=0.4), plain(folder, dropout=0.4)
    for each in (ours.model, model):
        for layer in dropout_layers(each.layers[-1]):
            layer._p_1 = 1.0
    assert ours.walk.computes_rows_only
    mx.random.seed(5)
    _, expected = plain_value_and_grad(model, made)
    mx.random.seed(5)
    _, got = ours.value_and_grad(made)
    ours.close()
    assert_same(got, expected)


# --- a batch that cannot be trained on ------------------------------------------------------


def test_a_batch_without_labels_is_named(tmp_path):
    """Its prompts leave nothing; and the engine goes on with the next batch."""
    folder = save(tmp_path, "llama", True)
    ours, model = engine(folder), plain(folder)
    empty = data.Batch(np.ones((2, 9), np.int32), np.zeros((2, 8), bool), indices=(7, 3))
    for method in (ours.value_and_grad, ours.loss):
        with pytest.raises(
            EdgeLoraError, match=r"batch of rows \[7, 3\]: no token carries a label"
        ):
            method(empty)
    check(ours, model, BATCHES["scattered"])
    ours.close()


@pytest.mark.parametrize("rows", [[], [3, 2], [1, 1], [-1, 2], [0, 34], [0.0, 1.0]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_that_are_none_of_the_batch(name, rows, tmp_path):
    """Whether the last block is spared or not; the model is left as it was."""
    ours, made = engine(save(tmp_path, name, False)), batch(2, 17, scattered, 3)
    layers = list(ours.model.layers)
    with pytest.raises(ValueError, match=r"rows: got \[.*\], expected one or more indices of 34"):
        walked(ours, made, mx.array(rows), mx.zeros((1, len(rows), 64)))
    assert all(a is b for a, b in zip(ours.model.layers, layers, strict=True))
    ours.close()
