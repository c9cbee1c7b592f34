"""The head is found by what it does, and its rows with what lies around give the model's logits."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGS, build, quantizable
from harness import save
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from peaks import highest, lowest
from tf32 import rounded

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter, eval_without_run_ahead
from mlx_edgelora.model import head as model_head
from mlx_edgelora.model.head import (
    ModelHead,
    ResidentRows,
    StreamedRows,
    check_rows,
    find_head,
    frozen_matrix,
    stream_embedding,
)
from mlx_edgelora.model.loading import _logits, attach, open_model
from mlx_edgelora.storage.safetensors import RowReader, read_header


def own_head(model):
    """Where mlx-lm keeps the head of these architectures."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def made_logits(head, hidden, rows):
    """Logits as a loss makes them."""
    x = head.final_norm(hidden).astype(mx.float32)
    tile = head.unpack(rows)
    products = x @ tile.weight.T + (0.0 if tile.bias is None else tile.bias)
    return products if head.logits_transform is None else head.logits_transform(products)


CHANGES_LOGITS = {"gemma2", "granite", "cohere2"}


@pytest.mark.parametrize("bits", [None, 4, 6])
@pytest.mark.parametrize("name", CONFIGS)
def test_head_is_found_and_its_rows_make_the_logits(name, bits):
    model = build(name)
    if bits:
        nn.quantize(model, **quantizable(bits))
    blocks = BlockList(model)
    module = find_head(blocks)
    assert module is own_head(model)
    before, kind = dict(module), type(module)
    head = ModelHead(blocks, module, ResidentRows(module))
    assert (head.vocabulary, head.dims) == (101, 64)
    assert head.is_separable()
    assert (head.logits_transform is not None) == (name in CHANGES_LOGITS)
    assert head.adapter is None
    hidden = mx.random.normal((5, 64))
    with blocks.skip_blocks(hidden[None]):
        expected = model(mx.zeros((1, 5), mx.int32))[0]
    parts = [head.slice(start, min(start + 33, 101)) for start in range(0, 101, 33)]
    logits = mx.concatenate([made_logits(head, hidden, rows) for rows in parts], axis=-1)
    assert mx.allclose(logits, expected, rtol=1e-5, atol=1e-5).item()
    some = mx.array([100, 0, 57, 57])
    picked = made_logits(head, hidden, head.take(some))
    assert mx.allclose(picked, expected[:, some], rtol=1e-5, atol=1e-5).item()
    assert {key: id(value) for key, value in module.items()} == {
        key: id(value) for key, value in before.items()
    }
    assert type(module) is kind


class Coupled(nn.Module):
    """A head with a bias; what follows it may mix the logits."""

    def __init__(self, after, head=None):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = [nn.Linear(8, 8) for _ in range(2)]
        self.head = nn.Linear(8, 40) if head is None else head
        self.after = after

    def __call__(self, tokens):
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.after(self.head(h))


@pytest.mark.parametrize(
    ("after", "separable"),
    [
        (lambda logits: logits, True),
        (lambda logits: 30 * mx.tanh(logits * 0.5 / 30), True),
        (lambda logits: logits - logits.mean(axis=-1, keepdims=True), False),
        (lambda logits: mx.softmax(logits, axis=-1), False),
        (lambda logits: logits - logits.max(axis=-1, keepdims=True), False),
        (lambda logits: mx.cumsum(logits, axis=-1), False),
    ],
)
def test_logits_that_depend_on_others_are_seen(after, separable):
    model = Coupled(after)
    blocks = BlockList(model)
    module = find_head(blocks)
    assert module is model.head
    assert ModelHead(blocks, module, ResidentRows(module)).is_separable() is separable


def test_a_head_in_two_factors_is_cut_at_the_second():
    model = Coupled(lambda logits: logits, nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 40)))
    blocks = BlockList(model)
    assert find_head(blocks) is model.head.layers[1]


def test_no_head_is_found_where_rows_are_not_logits():
    class Padded(Coupled):
        def __call__(self, tokens):
            logits = super().__call__(tokens)
            return mx.concatenate([logits, mx.zeros((*logits.shape[:-1], 2))], axis=-1)

    assert find_head(BlockList(Padded(lambda logits: logits))) is None


class Tied(Coupled):
    def __call__(self, tokens):
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.after(self.embed.as_linear(h))


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_is_found_with_its_adapter(tied):
    model = (Tied if tied else Coupled)(lambda logits: 3 * mx.tanh(logits / 3))
    if tied:
        model.embed = module = LoRAEmbedding.from_base(model.embed, r=2, scale=3.0)
    else:
        model.head = module = LoRALinear.from_base(model.head, r=2, scale=3.0)
    module.lora_a = mx.random.normal(module.lora_a.shape)
    module.lora_b = mx.random.normal(module.lora_b.shape)
    blocks = BlockList(model)
    assert find_head(blocks) is module
    head = ModelHead(blocks, module, ResidentRows(frozen_matrix(module)))
    assert head.is_separable()
    adapter, tile = head.adapter, head.unpack(head.slice(0, 40))
    hidden = mx.random.normal((5, 8))
    with blocks.skip_blocks(hidden[None]):
        expected = model(mx.zeros((1, 5), mx.int32))[0]
    matrix = tile.weight + adapter.scale * adapter.up @ adapter.down
    logits = head.logits_transform(hidden @ matrix.T + (0.0 if tied else tile.bias))
    assert mx.allclose(logits, expected, rtol=1e-5, atol=1e-5).item()


def on_disk(folder, table, dtype=None, meter=None):
    """Let an embedding read its rows from a file; gives their readers by name, and the rows."""
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), dict(table.items()))
    readers = {name: RowReader(path, info) for name, info in read_header(path).items()}
    rows = StreamedRows({name: readers[name] for name in table}, dtype, meter or DiskMeter())
    stream_embedding(table, rows)
    return readers, rows


@pytest.mark.parametrize("dtype", [None, mx.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
def test_embedding_on_disk_looks_up_and_projects_as_in_memory(tmp_path, quantized, dtype):
    table = nn.Embedding(101, 64)
    table = table.to_quantized(32, 4) if quantized else table
    tokens, hidden = mx.array([[100, 3, 3], [0, 57, 3]]), mx.random.normal((2, 64))
    expected, logits = table(tokens), table.as_linear(hidden)
    meter = DiskMeter()
    readers, rows = on_disk(tmp_path, table, dtype, meter)
    for name in list(table):
        table[name] = mx.zeros((1,))  # nothing may be read from memory
    got = table(tokens)
    read = meter.read_bytes
    assert read == sum(4 * reader.row_bytes for reader in readers.values())  # four tokens
    assert got.dtype == (dtype or mx.float32)
    tolerance = 0.02 if dtype else 1e-6
    assert mx.allclose(got.astype(mx.float32), expected, rtol=tolerance, atol=tolerance).item()
    table.update(rows.slice(10, 20))
    part = table.as_linear(hidden)
    assert part.shape == (2, 10)
    assert np.allclose(
        np.array(part.astype(mx.float32)), np.array(logits[:, 10:20]), rtol=0.05, atol=0.1
    )


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_embeddings_in_pieces_are_those_of_memory(tmp_path, monkeypatch, quantized, count):
    monkeypatch.setattr(model_head, "LOOKUP_BYTES", 3 * 4 * 64)
    table = nn.Embedding(101, 64)
    table = table.to_quantized(32, 4) if quantized else table
    tokens = mx.array([[(7 * i) % 101 for i in range(count)], [5] * count])
    expected = table(tokens)
    on_disk(tmp_path, table)
    assert mx.allclose(table(tokens), expected, rtol=1e-6, atol=1e-6).item()


@pytest.mark.slow
def test_looking_up_holds_the_result_and_little_more(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(model_head, "LOOKUP_BYTES", 2**14)
    table = nn.Embedding(2048, 512).to_quantized(64, 4)
    on_disk(tmp_path, table)
    tokens = mx.arange(2048)[None]

    def above_packed(evaluate):
        found = table(tokens)
        packed = mx.get_active_memory()
        mx.reset_peak_memory()
        evaluate(found)
        return mx.get_peak_memory() - packed

    result = 4 * 2048 * 512
    assert lowest(lambda: above_packed(eval_without_run_ahead), 1.1 * result) < 1.1 * result
    assert highest(lambda: above_packed(mx.eval)) > 2 * result  # MLX ahead: nothing in place


def separable_in_tf32(head, monkeypatch):
    """For how many of 60 inputs, where products of tiles round theirs to 10 bits."""
    unpack, final_norm, key = head.unpack, head.final_norm, mx.random.key

    def rounded_tile(rows):
        tile = unpack(rows)
        return replace(tile, weight=rounded(tile.weight))

    monkeypatch.setattr(head, "unpack", rounded_tile)
    monkeypatch.setattr(head, "final_norm", lambda *args: rounded(final_norm(*args)))
    found = 0
    for number in range(60):
        monkeypatch.setattr(mx.random, "key", lambda _, number=number: key(number))
        found += head.is_separable()
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_no_head_is_inseparable_because_of_rounding(name, monkeypatch):
    """As on an M5, where the model's own product with a packed head is exact and ours is not."""
    model = build(name, hidden_size=256)
    nn.quantize(model, **quantizable())
    blocks = BlockList(model)
    module = find_head(blocks)
    head = ModelHead(blocks, module, ResidentRows(module))
    assert separable_in_tf32(head, monkeypatch) == 60


@pytest.mark.parametrize(
    "behind",
    [
        partial(mx.softmax, axis=-1),
        lambda y: y - mx.logsumexp(y, axis=-1, keepdims=True),
        lambda y: y / mx.linalg.norm(y, axis=-1, keepdims=True),
        lambda y: y - y.mean(axis=-1, keepdims=True),
    ],
    ids=["softmax", "log-softmax", "norm", "mean"],
)
def test_a_head_is_inseparable_where_logits_are_mixed_behind_it(behind, monkeypatch):
    class Mixed(type(build("llama"))):
        def __call__(self, *args, **kwargs):
            return behind(super().__call__(*args, **kwargs))

    model = build("llama")
    object.__setattr__(model, "__class__", Mixed)
    blocks = BlockList(model)
    head = ModelHead(blocks, model.lm_head, ResidentRows(model.lm_head))
    assert not head.is_separable()
    assert separable_in_tf32(head, monkeypatch) == 0


class Centred(nn.Module):
    """A norm that looks at the other tokens of the text."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def __call__(self, x):
        return self.norm(x - x.mean(axis=1, keepdims=True))


class Placed(Centred):
    """And one that knows where a token is."""

    def __call__(self, x):
        return self.norm(x) * mx.arange(1, 1 + x.shape[1])[:, None]


@pytest.mark.parametrize("kind", [Centred, Placed])
def test_what_follows_the_blocks_is_computed_token_by_token_or_refused(kind):
    """Labelled tokens alone would get other logits."""
    model = build("llama", tie_word_embeddings=False)
    blocks = BlockList(model)
    head = ModelHead(blocks, model.lm_head, ResidentRows(model.lm_head))
    head.check_rows()
    check_rows(blocks, partial(_logits, blocks))
    model.model.norm = kind(model.model.norm)
    for check in (head.check_rows, lambda: check_rows(blocks, partial(_logits, blocks))):
        with pytest.raises(EdgeLoraError, match="what follows the blocks is not computed token by"):
            check()


def test_logits_that_depend_on_the_input_tokens_are_refused():
    class Biased(type(build("llama"))):
        def __call__(self, inputs, *args, **kwargs):
            return super().__call__(inputs, *args, **kwargs) + inputs[..., None]

    model = build("llama", tie_word_embeddings=False)
    object.__setattr__(model, "__class__", Biased)
    blocks = BlockList(model)
    with pytest.raises(EdgeLoraError, match="what follows the blocks is not computed token by"):
        check_rows(blocks, partial(_logits, blocks))


@pytest.mark.parametrize("by", ["rows of the head", "whole logits"])
def test_such_a_model_is_refused_when_its_weights_are_attached(by, tmp_path):
    folder = save(tmp_path, "llama", False, tie_word_embeddings=False)
    lazy = open_model(str(folder), streamed=False, quantize=None, cache=tmp_path)
    lazy.model.model.norm = Centred(lazy.model.model.norm)
    lazy.model.freeze()
    if by == "whole logits":  # something behind the blocks is trained
        lazy.model.model.norm.unfreeze()
    with pytest.raises(EdgeLoraError, match="what follows the blocks is not computed token by"):
        attach(lazy, streamed=False, dtype=None, meter=DiskMeter())
