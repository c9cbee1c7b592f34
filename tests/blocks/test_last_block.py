"""Which last blocks are computed for labelled tokens only, architecture by architecture."""

import re
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import CONFIGS, add_lora, build, quantizable
from backends import exact_reference
from mlx.utils import tree_flatten
from part_helpers import assert_rows_equal_whole, assert_tiles_equal_whole

from mlx_edgelora.blocks.attention import banded_masks
from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.model.weights import ResidentWeights


def tiling_of(model):
    return Tiling(BlockList(model), (ResidentWeights(),))


def choice(model):
    """Of a model that is frozen, as one is to which LoRA is added."""
    model.freeze()
    made = tiling_of(model).tileable(len(model.layers) - 1)
    model.unfreeze()
    return made


# They are cut at their cache, and cannot be computed for some tokens of a tile.
THROUGH_CACHE = {
    "gemma2",  # soft-capped scores: attention of its own
    "deepseek_v3",  # rotary scores go into attention as a floating mask
}
# Their third block is linear attention, of which every token is computed.
RECURRENT = {"qwen3_next", "olmo_hybrid"}
# Architecture, changes to its configuration, and why its last block cannot be computed for
# labelled tokens only, if so: the choice for each is written down, because one that is computed
# for every token is right too, and dear.
EXPECTED = [
    *[(name, {}, None) for name in CONFIGS if name not in THROUGH_CACHE | RECURRENT],
    *[(name, {}, "through its cache") for name in sorted(THROUGH_CACHE)],
    *[(name, {}, "recurrent") for name in sorted(RECURRENT)],
    ("qwen3_next", {"num_hidden_layers": 4}, None),
    ("gemma3_text", {"num_hidden_layers": 4}, None),  # full attention, where 3 ends in a window
    ("cohere2", {"num_hidden_layers": 4}, None),
    ("smollm3", {"num_hidden_layers": 4}, None),  # no rotary embedding
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
    ("llama", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, None),
    (  # frequencies that depend on the length
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "what a block computes depends on how long the text is",
    ),
]


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
@pytest.mark.parametrize(("name", "changes", "reason"), EXPECTED, ids=str)
def test_choice(name, changes, reason, quantized):
    if changes.get("layer_types"):
        changes = changes | {"sliding_window": 5}
    model = build(name, **changes)
    if quantized:
        nn.quantize(model, **quantizable())
        exact_reference(model)
    made = choice(model)
    assert made.by_rows == (reason is None), made
    assert (made.recurrence is not None) == (reason == "recurrent")
    if reason in (None, "through its cache", "recurrent"):
        through_cache = reason == "through its cache"
        assert (made.possible, made.reason, made.through_cache) == (True, "", through_cache)
    else:
        assert not made.possible
        assert re.match(reason, made.reason)


def test_sinks_that_are_trained():
    """Their gradient passes beside queries, keys and values, through the block's own call."""
    model = build("gpt_oss")
    made = tiling_of(model).tileable(2)
    assert (made.possible, made.through_cache, made.by_rows) == (True, False, True)
    x, block = mx.random.normal((2, 9, model.args.hidden_size)), model.layers[2]
    assert "self_attn.sinks" in dict(tree_flatten(block.trainable_parameters()))
    assert_rows_equal_whole(block, [1, 5, 9, 17], x, "causal")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "ministral3", "cohere2"])
def test_rounding_is_no_reason(name, dtype):
    model = build(name)
    model.set_dtype(dtype)
    assert choice(model).by_rows


LONG = 40  # behind every window and original length of these configurations


@pytest.mark.parametrize(
    ("name", "changes", "known"),
    [(*row[:2], number % 2 == 0) for number, row in enumerate(EXPECTED) if row[2] is None],
    ids=str,
)
def test_what_was_tried_on_a_few_tokens_holds_behind_every_window(name, changes, known):
    """The trial's 7 tokens do not reach where windows of 16 and other scales begin."""
    changes = {"sliding_window": 16} | changes
    if name == "ministral3":
        scales = CONFIGS[name]["rope_parameters"] | {"original_max_position_embeddings": 16}
        changes |= {"rope_parameters": scales}
    model = build(name, **changes)
    assert choice(model).by_rows
    calls = []

    def record(index, x, args, kwargs):
        calls.append((args, kwargs))
        return x

    blocks = BlockList(model)
    with blocks.intercept(record), banded_masks() if known else nullcontext():
        model(mx.zeros((3, LONG), mx.int32))
    x = mx.random.normal((3, LONG, 64), key=mx.random.key(2))
    rows = [0, 15, 16, 17, 39, 80, 95, 96, 97, 98, 119]
    args, kwargs = calls[-1]
    block = blocks.blocks[-1]
    assert_rows_equal_whole(block, rows, x, *args, tolerance=2e-5, **kwargs)
    cuts = [9, 17, 34]
    assert_tiles_equal_whole(block, cuts, x, *args, rows=rows, tolerance=2e-5, **kwargs)


# --- dropout --------------------------------------------------------------------------------


def dropout_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]


def test_dropout_is_asked_about_anew_and_left_alone():
    model = build("llama")
    add_lora(model, dropout=0.5)
    layers, state = dropout_layers(model), mx.array(mx.random.state[0])
    assert layers
    tiling = tiling_of(model)

    def dropped():
        made = tiling.tileable(2)
        reason = "dropout would draw other masks for parts of the tokens"
        return (made.possible, made.by_rows, made.reason) == (False, False, reason)

    assert dropped()
    assert all(layer.training for layer in layers)
    model.eval()
    assert tiling.tileable(2).by_rows
    assert not any(layer.training for layer in layers)
    model.train()
    assert dropped()
    assert mx.array_equal(mx.random.state[0], state).item()  # the trial drew nothing


def test_dropout_in_other_blocks_or_of_no_share_does_not_matter():
    model = build("llama")
    add_lora(model, dropout=0.5)
    for layer in dropout_layers(model.layers[-1]):
        layer._p_1 = 1
    assert choice(model).by_rows
    assert all(layer.training for layer in dropout_layers(model))


class Counted(ResidentWeights):
    def __init__(self):
        self.read = []

    def block(self, index):
        self.read.append(index)
        return super().block(index)


def test_the_trial_is_made_once_for_a_kind_and_reads_that_block_alone():
    weights = Counted()
    tiling = Tiling(BlockList(build("llama")), (weights,))
    assert weights.read == []
    assert tiling.tileable(2).by_rows
    once = list(weights.read)
    assert set(once) == {2}
    assert [tiling.tileable(index).by_rows for index in (2, 0, 1, 2)] == [True] * 4
    assert weights.read == once


def test_what_was_tried_elsewhere_is_not_tried_again():
    """Verification walks a model that is the first blocks of another."""
    weights, short = Counted(), build("llama")
    like = tiling_of(build("llama"))
    short.model.layers = short.layers[:2]
    assert like.tileable(2).by_rows
    assert Tiling(BlockList(short), (weights,), like).tileable(1).by_rows
    assert weights.read == []
    assert not Tiling(BlockList(build("gemma2")), (weights,), like).tileable(1).by_rows
    assert set(weights.read) == {1}
