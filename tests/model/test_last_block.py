"""Which last blocks are computed for labelled tokens only, architecture by architecture."""

import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import CONFIGS, add_lora, build, quantizable
from spared import assert_spared_equals_whole

from mlx_edgelora.model.blocks import BlockList
from mlx_edgelora.model.labelled import LastBlock
from mlx_edgelora.model.sources import ResidentWeights


def choice(model):
    return LastBlock(BlockList(model), ResidentWeights()).choice()


OWN_ATTENTION = r"the last block cannot be called for single tokens: \[broadcast_shapes\]"
RECURRENT = "the last block cannot be called for single tokens: 'EmptyCache' object is not"
NOT_SPARED = {
    "gemma2": OWN_ATTENTION,  # soft-capped scores
    "deepseek_v3": OWN_ATTENTION,  # rotary scores of each token with the keys of another row
    "qwen3_next": RECURRENT,  # its third block is linear attention
    "olmo_hybrid": RECURRENT,
}
# Architecture, changes to its configuration, and why it is refused, if so: the choice for each
# is written down, because one that is computed for every token is right too, and dear.
EXPECTED = [
    *[(name, {}, None) for name in CONFIGS if name not in NOT_SPARED],
    *[(name, {}, reason) for name, reason in NOT_SPARED.items()],
    ("qwen3_next", {"num_hidden_layers": 4}, None),
    ("gemma3_text", {"num_hidden_layers": 4}, None),  # full attention, where 3 ends in a window
    ("cohere2", {"num_hidden_layers": 4}, None),
    ("smollm3", {"num_hidden_layers": 4}, None),  # no rotary embedding
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
    ("llama", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, None),
    (  # frequencies that depend on the length
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "the last block cannot be called for single tokens: .*length-1 arrays",
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
    spared, why = made = choice(model)
    assert spared == (reason is None), made
    if reason is None:
        assert str(made) == "labelled tokens only (a trial gave the same)"
    else:
        assert re.match(reason, why)
        assert str(made) == f"every token ({why})"


@pytest.fixture
def uncompiled():
    """MLX calls a C++ compiler for each fused kernel of a dtype; what it computes is the same."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "ministral3", "cohere2"])
def test_rounding_is_no_reason(name, dtype, uncompiled):
    model = build(name)
    model.set_dtype(dtype)
    assert choice(model).spared


LONG = 40  # behind every window and original length of these configurations


@pytest.mark.parametrize(
    ("name", "changes"), [row[:2] for row in EXPECTED if row[2] is None], ids=str
)
def test_what_was_tried_on_a_few_tokens_holds_behind_every_window(name, changes):
    """The trial's 7 tokens do not reach where windows of 16 and other scales begin."""
    changes = {"sliding_window": 16} | changes
    if name == "ministral3":
        scales = CONFIGS[name]["rope_parameters"] | {"original_max_position_embeddings": 16}
        changes |= {"rope_parameters": scales}
    model = build(name, **changes)
    assert choice(model).spared
    calls = []

    def record(index, x, args, kwargs):
        calls.append((args, kwargs))
        return x

    blocks = BlockList(model)
    with blocks.intercepted(record):
        model(mx.zeros((3, LONG), mx.int32))
    x = mx.random.normal((3, LONG, 64), key=mx.random.key(2))
    rows = [0, 15, 16, 17, 39, 80, 95, 96, 97, 98, 119]
    args, kwargs = calls[-1]
    assert_spared_equals_whole(blocks.blocks[-1], rows, x, *args, tolerance=2e-5, **kwargs)


# --- dropout --------------------------------------------------------------------------------


def dropout_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]


def test_dropout_is_asked_about_anew_and_left_alone():
    model = build("llama")
    add_lora(model, dropout=0.5)
    layers, state = dropout_layers(model), mx.array(mx.random.state[0])
    assert layers
    last = LastBlock(BlockList(model), ResidentWeights())
    dropped = (False, "dropout would draw other masks for fewer tokens")
    assert last.choice() == dropped
    assert all(layer.training for layer in layers)
    model.eval()
    assert last.choice().spared
    assert not any(layer.training for layer in layers)
    model.train()
    assert last.choice() == dropped
    assert mx.array_equal(mx.random.state[0], state).item()  # the trial drew nothing


def test_dropout_in_other_blocks_or_of_no_share_does_not_matter():
    model = build("llama")
    add_lora(model, dropout=0.5)
    for layer in dropout_layers(model.layers[-1]):
        layer._p_1 = 1
    assert choice(model).spared
    assert all(layer.training for layer in dropout_layers(model))


def test_dropout_is_put_back_when_the_trial_fails(monkeypatch):
    model = build("llama")
    add_lora(model, dropout=0.5)

    def failing(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_edgelora.model.labelled._trials", failing)
    with pytest.raises(KeyboardInterrupt):
        choice(model)
    assert all(layer.training for layer in dropout_layers(model))


def test_the_trial_is_made_once_and_reads_the_last_block_alone():
    read = []

    class Counted(ResidentWeights):
        def block(self, index):
            read.append(index)
            return super().block(index)

    last = LastBlock(BlockList(build("llama")), Counted())
    assert read == []
    assert last.choice().spared
    once = list(read)
    assert set(once) == {2}
    assert [last.choice().spared for _ in range(2)] == [True] * 2
    assert read == once
