"""Rows that share a row: the loss and all gradients are those of the rows alone."""

from contextlib import closing
from itertools import chain
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGS
from harness import assert_same_gradients, engine, plain, save
from toy import Block, Toy

from mlx_edgelora.blocks import packed_attention
from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.packable import check_packing
from mlx_edgelora.blocks.packing import Packing, packing_now, rows_packed
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.data import Batch, iterate_batches
from mlx_edgelora.engine.functions import MOST_FORMS
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.weights import ResidentWeights

# Three shared rows of 24 tokens, 23 of them inputs; some rows are longer than windows, some not.
LENGTHS, CAPACITY = [11, 3, 2, 7, 19, 5, 4, 8, 9], 24

# Which mix the rows that share a row, and why.
MIXING = {
    "gemma2": "neither causal nor a window|differs by",  # attention of its own
    "qwen3_next": "differs by",  # a recurrence
    "olmo_hybrid": "differs by",
    "deepseek_v3": "neither causal nor a window",  # rotary scores as a mask
    "ministral3": "differs by",  # queries are scaled by their position behind 8 tokens
}
EXACT = [name for name in CONFIGS if name not in MIXING]


def some_rows(lengths=LENGTHS, seed=0):
    """Random rows with several labelled spans each."""
    random = np.random.RandomState(seed)
    rows = []
    for length in lengths:
        first = random.randint(1, length)
        spans = [(first, min(length, first + 2)), (length - 1, length)]
        rows.append((random.randint(1, 101, length).tolist(), spans))
    return rows


def shared(rows, capacity=CAPACITY) -> Batch:
    (batch,) = iterate_batches(rows, 99, capacity, seed=0, packing=True)
    assert batch.starts is not None
    return batch


def alone(model, rows):
    """Plain MLX's loss and gradients, each row by itself."""
    batches = [next(iterate_batches([row], 1, len(row[0]))) for row in rows]
    count = sum(int(batch.mask.sum()) for batch in batches)

    def loss(model):
        total = mx.array(0.0)
        for batch in batches:
            logits = model(mx.array(batch.inputs())).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, mx.array(batch.labels()))
            total = total + (losses * mx.array(batch.mask)).sum()
        return total / count

    value, gradients = nn.value_and_grad(model, loss)(model)
    mx.eval(value, gradients)
    return value.item(), gradients


# How blocks are computed: whole, by tiles, kept below a head on disk, with the loss as one.
WAYS = {
    "whole": {},
    "tiled": {"tile_tokens": 15, "prefetch": False},
    "tiles of one token": {"tile_tokens": 3},
    "kept": {"kept_blocks": 2, "head": "streamed"},
    "tail": {"kept_blocks": 2},
    "all kept": {"kept_blocks": 3},
    "micro-batches": {"micro_batches": 2, "mlp_bytes": 20_000},
}


FAST = ("gemma3_text", "gpt_oss")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in EXACT]
)
def test_gradients_are_those_of_the_rows_alone(name, tmp_path):
    folder, rows = save(tmp_path, name, False), some_rows()
    batch = shared(rows)
    assert len(batch.tokens) == 3 and batch.inputs().shape[1] == CAPACITY - 1
    expected_loss, expected = alone(plain(folder), rows)
    for options in (WAYS["whole"], WAYS["tiled"], WAYS["tail"]):
        with closing(engine(folder, streamed=False, **options)) as ours:
            ours.walk.check_packing(CAPACITY - 1)
            (loss, count), got = ours.value_and_grad(batch)
            assert count == batch.mask.sum()
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert ours.loss(batch)[0].item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected)


@pytest.mark.parametrize(
    ("name", "in_tiles"),
    [
        ("gemma3_text", False),
        *(
            pytest.param(name, in_tiles, marks=pytest.mark.slow)
            for name, in_tiles in (("llama", False), ("gemma3_text", True), ("gpt_oss", True))
        ),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_in_every_way_in_which_blocks_are_computed(name, way, in_tiles, tmp_path, monkeypatch):
    if in_tiles:  # as in rows of hundreds of tokens
        monkeypatch.setattr("mlx_edgelora.blocks.attention.TILE_BYTES", 0)
        monkeypatch.setattr("mlx_edgelora.layers.attention.TILE_BYTES", 600)
    folder, rows = save(tmp_path, name, True), some_rows([17, *LENGTHS, 24], seed=1)
    expected_loss, expected = alone(plain(folder), rows)
    with closing(engine(folder, **WAYS[way])) as ours:
        (loss, _), got = ours.value_and_grad(shared(rows))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)
    assert packing_now() is None


@pytest.fixture
def shapes_of_a_gpu(monkeypatch):
    """Attention by ranges, which are padded as on a GPU."""
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(
        "mlx_edgelora.blocks.packing.mx", SimpleNamespace(**vars(mx) | {"cuda": cuda})
    )
    gpu = SimpleNamespace(**vars(mx) | {"default_device": lambda: mx.gpu})
    monkeypatch.setattr("mlx_edgelora.blocks.packed_attention.mx", gpu)


@pytest.fixture
def as_with_cuda(monkeypatch):
    """Attention by pieces."""
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(
        "mlx_edgelora.blocks.packing.mx", SimpleNamespace(**vars(mx) | {"cuda": cuda})
    )


@pytest.mark.parametrize(
    ("name", "way", "size", "lengths"),
    [
        ("gemma3_text", "all kept", 8, [70, 3, 33, 12, 9, 5, 131]),
        ("llama", "tiled", 128, [17, 3, 16, 12, 9, 5, 15]),
        ("gemma3_text", "micro-batches", 8, LENGTHS),
        *(
            pytest.param(name, way, size, lengths, marks=pytest.mark.slow)
            for name, ways in (("gemma3_text", ("whole", "tiled", "tail")), ("gpt_oss", ("whole",)))
            for way in ways
            for size, lengths in ((8, LENGTHS), (128, [270, 3, 66, 70, 5, 130, 131]))
        ),
    ],
)
def test_pieces_give_the_gradients_of_the_rows_alone(
    name, way, size, lengths, tmp_path, as_with_cuda, monkeypatch
):
    monkeypatch.setattr(packed_attention, "PIECE", size)
    folder, rows = save(tmp_path, name, True), some_rows(lengths)
    expected_loss, expected = alone(plain(folder), rows)
    with closing(engine(folder, **WAYS[way])) as ours:
        (loss, _), got = ours.value_and_grad(shared(rows, max(lengths) + 30))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)


def test_pieces_of_all_batches_have_few_shapes(as_with_cuda):
    random, shapes, forms = np.random.RandomState(0), set(), set()
    lengths = np.clip(random.lognormal(np.log(84) - 0.18, 0.6, 2000).astype(int), 8, 1024)

    def attend(queries, keys, values, mask):
        shapes.add((queries.shape, keys.shape, mask.shape))
        return values[:, :, -queries.shape[2] :]

    for batch in iterate_batches([([1] * n, 0) for n in lengths], 1, 1025, seed=0, packing=True):
        packing, x = Packing(batch.starts), mx.zeros((1, 1, batch.inputs().shape[1], 1))
        with packing.recording() as uses:
            packing.attention(attend, x, x, x, "causal")
        forms.add(packing.form(uses))
    assert len(shapes) <= 5 and len(forms) <= 5  # the last batch is shorter


def test_masks_of_pieces_are_bounded():
    """Rows of thousands of tokens are attended to by ranges."""
    starts = np.zeros((1, 8192), int)
    assert packed_attention.pieces(starts, (0, 8192), (0, 8192), None) is None
    whole = packed_attention.pieces(starts[:, :1024], (0, 1024), (0, 1024), None)
    assert whole.size == 1024
    assert packed_attention.pieces(starts, (0, 8192), (0, 8192), 512).size == 512


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_ranges_without_a_token_change_nothing(name, tmp_path, shapes_of_a_gpu):
    folder, rows = save(tmp_path, name, True), some_rows([40, 3, 66, 70, 5, 130, 131])
    expected_loss, expected = alone(plain(folder), rows)
    with closing(engine(folder, kept_blocks=3)) as ours:
        (loss, _), got = ours.value_and_grad(shared(rows, 160))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)


def test_an_epoch_on_a_gpu_has_few_shapes(shapes_of_a_gpu):
    """A step is compiled for each form, and cuDNN builds a kernel for each call's shape."""
    random, shapes, forms = np.random.RandomState(0), set(), set()
    lengths = np.clip(random.lognormal(np.log(84) - 0.18, 0.6, 2000).astype(int), 8, 1024)
    rows = [([1] * length, 0) for length in lengths]

    def attend(queries, keys, values, mask):
        shapes.add((queries.shape, keys.shape, mask))
        return values

    for batch in iterate_batches(rows, 1, 1025, seed=0, packing=True):
        packing, x = Packing(batch.starts), mx.zeros((1, 1, batch.inputs().shape[1], 1))
        with packing.recording() as uses:
            packing.attention(attend, x, x, x, "causal")
        forms.add(packing.form(uses))
    assert len(shapes) <= 24 and len(forms) <= MOST_FORMS


@pytest.mark.parametrize("kept", [pytest.param(0, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("pieces", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_functions_are_told_where_rows_begin(kept, pieces, tmp_path, compiles, request):
    """The third batch is computed by what was compiled for the second one."""
    if pieces:
        request.getfixturevalue("as_with_cuda")
    folder = save(tmp_path, "gemma3_text", True)
    model = plain(folder)
    options = {"compiled": True, "kept_blocks": kept, "streamed": False}
    with closing(engine(folder, **options)) as ours:
        for seed, lengths in enumerate([(11, 9), (5, 15), (13, 8), (16, 3), (3, 6, 12)]):
            rows = some_rows(lengths, seed)
            expected_loss, expected = alone(model, rows)
            (loss, _), got = ours.value_and_grad(shared(rows))
            assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
            assert_same_gradients(got, expected)
            functions = ours.walk.compiled_functions
            assert functions == 0 if seed == 0 else functions > 0
            if seed == 2:
                before = functions
            elif seed == 3:
                assert functions == before


@pytest.mark.parametrize("name", ["qwen3"])
def test_rows_that_see_one_another_have_other_gradients(name, tmp_path):
    """What the tests above compare is not blind to it."""
    folder, rows = save(tmp_path, name, True), some_rows()
    batch = shared(rows)
    _, expected = alone(plain(folder), rows)
    leaking = Batch(batch.tokens, batch.mask, batch.indices)
    with closing(engine(folder)) as ours:
        _, got = ours.value_and_grad(leaking)
        with pytest.raises(AssertionError, match="of its norm"):
            assert_same_gradients(got, expected, 1e-2)


def test_no_token_of_a_row_reaches_another_one(tmp_path):
    """Every gradient that one row's labels make is the same whatever its neighbours are."""
    folder = save(tmp_path, "llama", True)
    found = []
    for seed in (0, 1):
        rows, others = some_rows(), some_rows(seed=seed)
        rows = [rows[0], *[(tokens, []) for tokens, _ in others[1:]]]
        tokens = [row[0] for row in rows]
        starts = np.cumsum([0, *map(len, tokens)])
        line = list(chain(*tokens))
        mask = np.zeros((1, len(line) - 1), bool)
        mask[0, 2 : len(tokens[0]) - 1] = True
        own = np.repeat(starts[:-1], list(map(len, tokens)))[None, :-1]
        with closing(engine(folder)) as ours:
            batch = Batch(np.array([line], np.int32), mask, (0,), own)
            found.append(ours.value_and_grad(batch)[1])
    assert_same_gradients(found[1], found[0], 1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_is_refused_by_name(name, tmp_path):
    folder = save(tmp_path, name, True)
    refused = pytest.raises(EdgeLoraError, match=rf"^packing: {name} mixes .*({MIXING[name]})")
    with closing(engine(folder)) as ours, refused:
        ours.walk.check_packing(CAPACITY - 1)


def test_scales_that_change_behind_some_position_are_seen_where_rows_are_so_long(tmp_path):
    parameters = {"original_max_position_embeddings": 100, "llama_4_scaling_beta": 0.5}
    parameters |= {"rope_theta": 10000.0}
    folder = save(tmp_path, "ministral3", True, rope_parameters=parameters)
    with closing(engine(folder)) as ours:
        ours.walk.check_packing(99)
        with pytest.raises(EdgeLoraError, match="differs by"):
            ours.walk.check_packing(140)


class Scaled(Block):
    """Knows where a token is, without a cache."""

    def __call__(self, x, mask=None, **others):
        scale = mx.where(mx.arange(x.shape[1]) < 60, 1.0, 2.0)
        return x + mx.tanh(self.proj(x)) * scale[:, None]


class Convolved(Block):
    def __call__(self, x, mask=None, **others):
        before = mx.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return x + mx.tanh(self.proj(x + before))


class Positioned(Toy):
    def loop(self, h):
        return super().loop(h + mx.arange(h.shape[1])[:, None] * 1e-2)


@pytest.mark.parametrize(
    ("model", "tokens", "reason"),
    [
        (lambda: Toy(Block), 100, None),
        (lambda: Toy(Scaled), 60, None),
        (lambda: Toy(Scaled), 70, r"block 0 \(Scaled\): a row differs by"),
        (lambda: Toy(Convolved), 40, r"block 0 \(Convolved\): a row differs by"),
        (Positioned, 40, "what embeds its tokens depends on their positions"),
    ],
)
def test_trials_of_blocks(model, tokens, reason):
    blocks = BlockList(model())
    weights = [ResidentWeights()]
    if reason is None:
        check_packing(blocks, weights, Tiling(blocks, weights), tokens)
        return
    with pytest.raises(EdgeLoraError, match=rf"^packing: .* mixes .*{reason}.*leave --packing"):
        check_packing(blocks, weights, Tiling(blocks, weights), tokens)


def test_positions_begin_anew_to_the_last_bit():
    """At position 3,000 an angle in float32 is off by 1e-4 of what it is at position 0."""
    # Where heads have 16 entries, MLX 0.32.4 asks CUDA for blocks of 128 threads along z, of 64.
    rope, x = nn.RoPE(32), mx.random.normal((2, 3, 3000, 32))
    starts = np.zeros((2, 3000), int)
    starts[0, 2900:], starts[1, 2950:] = 2900, 2950
    with rows_packed(Packing(starts)):
        got = rope(x)
        far = rope(x[:, :, 2890:], offset=2890)
    assert mx.allclose(got[0, :, 2900:], rope(x[0:1, :, 2900:])[0], atol=1e-6)
    assert mx.allclose(got[1, :, 2950:], rope(x[1:2, :, 2950:])[0], atol=1e-6)
    assert mx.array_equal(got[:, :, 2890:], far)
    assert not mx.allclose(got, rope(x), atol=1e-2)
    assert mx.fast.rope is not None and packing_now() is None


@pytest.mark.parametrize("dims", [8, 16, 32])
def test_positions_of_small_heads_with_cuda(dims, as_with_cuda):
    """Tokens are repeated where they have few entries; attention alone cannot see all shifted."""
    rope, x = nn.RoPE(dims), mx.random.normal((2, 3, 40, 32))
    starts = np.zeros((2, 40), int)
    starts[0, 30:], starts[1, 25:] = 30, 25
    with rows_packed(Packing(starts)):
        got = rope(x)
    for row, begin in enumerate((30, 25)):
        own = x[row : row + 1]
        expected = mx.concatenate([rope(own[:, :, :begin]), rope(own[:, :, begin:])], axis=2)
        assert mx.allclose(got[row], expected[0], atol=1e-6)


def test_what_takes_part_is_put_back_after_an_error():
    before = mx.fast.rope
    with pytest.raises(RuntimeError), rows_packed(Packing(np.zeros((1, 4), int))):
        raise RuntimeError
    assert mx.fast.rope is before and packing_now() is None
