"""The engine: streamed weights, spilled activations, labelled rows, tiles of the head."""

import json
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from architectures import CONFIGS, build, config
from harness import (
    Batch,
    assert_same_gradients,
    engine,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config
from pairwise import pairwise
from peaks import highest, lowest, peak

from mlx_edgelora.data import iterate_batches
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.model import weights as sources
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.storage.device_memory import to_numpy
from mlx_edgelora.storage.stores import MappedStore


def check(folder, batch, tolerance=1e-5, **options):
    lora = {key: options[key] for key in ("keys", "num_layers") if key in options}
    reference = plain(folder, **lora)
    expected_loss, expected = plain_value_and_grad(reference, batch)
    with closing(engine(folder, **options)) as ours:
        (loss, count), got = ours.value_and_grad(batch)
        again, _ = ours.loss(batch)
    assert count == batch.mask.sum()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert again.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected, tolerance, resolution(reference, batch))
    return ours


@pytest.mark.parametrize("options", [{}, {"tile_tokens": 256}], ids=["whole", "tiles"])
def test_more_padding_changes_nothing(options, tmp_path, monkeypatch):
    """Long batches are padded further on a GPU."""
    folder, rng = save(tmp_path, "llama", True), np.random.RandomState(0)
    rows = [(rng.randint(1, 101, length).tolist(), 400) for length in (515, 520)]
    batches = []
    for device in (mx.cpu, mx.gpu):
        with monkeypatch.context() as patch:
            patch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
            batches += iterate_batches(rows, 2, 2048, seed=0)
    assert [batch.inputs().shape[1] for batch in batches] == [544, 640]
    with closing(engine(folder, **options)) as ours:
        (loss, count), expected = ours.value_and_grad(batches[0])
        (padded_loss, padded_count), got = ours.value_and_grad(batches[1])
        again = [ours.loss(batch)[0].item() for batch in batches]
    assert padded_count == count == 235
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert again == pytest.approx([loss.item()] * 2, rel=1e-6)
    assert_same_gradients(got, expected)


WAYS = [
    {"streamed": False, "spilled": False},
    {"streamed": False, "kernel": "fused"},
    {"streamed": True, "kernel": "fused", "num_layers": 1},
    {"streamed": True, "keys": ["model.embed_tokens", "self_attn.q_proj"]},
]
UNTIED_WAYS = [
    {"streamed": True, "keys": ["lm_head", "self_attn.q_proj"]},
    {"streamed": False, "keys": ["lm_head", "self_attn.q_proj"]},
    {"streamed": True, "keys": ["lm_head", "model.embed_tokens", "mlp.up_proj"]},
]
FLOAT_OR_PACKED = [False, True]


@pytest.mark.parametrize(
    ("name", "options", "quantized"),
    pairwise(["llama"], UNTIED_WAYS, FLOAT_OR_PACKED)
    + pairwise(["llama", "gemma2", "qwen2", "cohere2"], WAYS, FLOAT_OR_PACKED),
    ids=str,
)
def test_every_way_of_running_gives_the_same_gradients(name, options, quantized, tmp_path):
    ours = check(
        save(tmp_path, name, quantized),
        random_batch(tokens=13),
        loss=CrossEntropy(16_384),
        **options,
    )
    assert ours.head is not None  # an adapter on the head does not cost it its tiles


def test_whole_logits_where_something_behind_the_blocks_has_dropout(tmp_path):
    folder = save(tmp_path, "llama", True)
    ours = engine(folder, keys=["lm_head"], dropout=0.5)
    assert ours.head is None
    ours.value_and_grad(random_batch())
    ours.close()


@pytest.mark.slow
def test_streamed_weights_are_never_resident(tmp_path, memory):
    """Streaming saves all of the file but the two or three blocks in flight."""
    big = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    folder = save(tmp_path, "llama", True, **big, vocab_size=8192)
    whole = (folder / "model.safetensors").stat().st_size
    embeddings = 2 * 8192 * 256 * 5 / 8  # untied; 4 bits and, per 32, two float32
    block = (whole - embeddings) / 16
    batch = random_batch(1, 16, vocabulary=8192)

    def measures(ours):
        return [partial(peak, partial(run, batch)) for run in (ours.value_and_grad, ours.loss)]

    with closing(engine(folder, streamed=False, spilled=False)) as ours:
        bounds = [highest(measure) - (whole - 3 * block) for measure in measures(ours)]
    del ours
    with closing(engine(folder)) as ours:
        for _ in range(2):
            ours.value_and_grad(batch)
        read = ours.disk.read_bytes
        for measure, bound in zip(measures(ours), bounds, strict=True):
            assert lowest(measure, bound) < bound
    assert read > 2 * 2 * (whole - embeddings)  # two steps, each block twice: nothing is kept


class InTurn:
    """A worker that does at once what it is given."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self):
        pass


@pytest.fixture
def events(monkeypatch):
    """What happens to blocks; b: the walk asks for a block; r: the block is read."""
    found = []

    def spied(letter, method):
        return lambda self, index, *rest: (
            found.append(f"{letter}{index}") or method(self, index, *rest)
        )

    for letter, name in (("b", "block"), ("r", "_fill")):
        monkeypatch.setattr(StreamedWeights, name, spied(letter, getattr(StreamedWeights, name)))
    monkeypatch.setattr(sources, "ThreadPoolExecutor", InTurn)
    return found


@pytest.mark.parametrize(
    ("num_layers", "backward"), [(-1, "b2 r2 r1 b1 r0 b0"), (2, "b2 r2 r1 b1"), (1, "b2 r2")]
)
def test_a_block_is_read_once_per_visit_and_ahead_of_it(num_layers, backward, tmp_path, events):
    ours = engine(save(tmp_path, "llama", True), num_layers=num_layers)
    assert ours.walk.computes_rows_only
    assert set(events) == {"b2", "r2"}  # for its trial
    events.clear()
    ours.value_and_grad(random_batch())
    forward = "b0 r0 r1 b1 r2 b2"
    assert " ".join(events) == f"{forward} {backward}"
    events.clear()
    ours.loss(random_batch())
    assert " ".join(events) == forward
    ours.close()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", {"TiledBlock"}),
        ("qwen3_5", {"RecurrentBlock", "TiledBlock"}),
        ("longcat_flash", {"CachedBlock"}),
    ],
)
def test_by_tiles_the_next_block_is_read_ahead_too(name, kinds, tmp_path, events, monkeypatch):
    settings = json.loads((Path(__file__).parents[1] / "sweep" / "configs.json").read_text())
    monkeypatch.setitem(CONFIGS, name, settings.get(name) or CONFIGS[name])
    with closing(engine(save(tmp_path, name, True), tile_tokens=10)) as ours:
        ours.walk._tiling.summary()  # its trials read blocks
        events.clear()
        tokens = mx.zeros((2, 23), mx.int32)
        with ours.walk.forward(lambda: ours.model(tokens), keep=False) as state:
            assert {type(segment).__name__ for segment in state.segments} == kinds
        forward = " ".join(events)
        events.clear()
        ours.value_and_grad(random_batch(2, 23))
    last = len(ours.walk.blocks) - 1
    ahead = [f"r{index} b{index}" for index in range(1, last + 1)]
    assert forward == " ".join(["b0 r0", *ahead])
    back = [f"r{index} b{index}" for index in reversed(range(last))]
    assert " ".join(events) == " ".join([forward, f"b{last} r{last}", *back])


@pytest.mark.parametrize(("num_layers", "count"), [(-1, 4), (2, 2)])
def test_an_input_is_on_its_way_while_the_block_above_computes(
    num_layers, count, tmp_path, monkeypatch
):
    events = []

    def spied(name):
        method = getattr(MappedStore, name)
        return lambda self, slot, **how: events.append((name, slot)) or method(self, slot, **how)

    for name in ("take", "prefetch"):
        monkeypatch.setattr(MappedStore, name, spied(name))
    ours = engine(save(tmp_path, "llama", True, num_hidden_layers=4), num_layers=num_layers)
    ours.value_and_grad(random_batch())
    ours.close()
    expected = []
    for slot in reversed(range(count)):
        expected += [("take", slot), ("prefetch", slot), ("prefetch", slot - 1)]
    assert events == expected[:-1]  # take asks for its own slot; below the lowest is nothing


def test_logits_are_made_for_labelled_rows_only(tmp_path):
    folder = save(tmp_path, "llama", False)
    batch = random_batch(2, 17)
    batch.mask[:] = False
    batch.mask[1, 4:7] = True
    rows = []

    class Counted(CrossEntropy):
        def value_and_grad(self, hidden, head, labels):
            rows.append(hidden.shape[0])
            return super().value_and_grad(hidden, head, labels)

    check(folder, batch, loss=Counted())
    assert rows == [3]


def test_batch_without_labels_names_its_rows(tmp_path):
    ours = engine(save(tmp_path, "llama", False))
    with pytest.raises(EdgeLoraError, match=r"batch of rows \[0, 1\]: no token carries a label"):
        ours.value_and_grad(Batch(np.zeros((2, 9), np.int32), np.zeros((2, 8), bool)))
    ours.close()


def test_tensors_that_mlx_lm_computes_are_rewritten_once(tmp_path):
    """A raw mixture of experts: one file entry per expert, which sanitize stacks."""
    model = build("qwen3_moe")
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        if "switch_mlp" not in name:
            weights[name] = value
            continue
        for expert in range(value.shape[0]):
            weights[name.replace("switch_mlp", f"experts.{expert}")] = value[expert]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    save_config(config("qwen3_moe"), tmp_path / "config.json")
    ours = check(tmp_path, random_batch())
    (copy,) = (tmp_path / "cache").iterdir()
    written = (copy / "model.safetensors").stat().st_mtime_ns
    check(tmp_path, random_batch())
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    assert ours.disk.read_bytes > 0


def test_dtype_casts_weights_and_activations(tmp_path):
    folder = save(tmp_path, "llama", True)
    batch = random_batch()
    reference = plain(folder)
    expected, _ = plain_value_and_grad(reference, batch)
    for streamed in (True, False):
        ours = engine(folder, dtype="bfloat16", streamed=streamed)
        (loss, _), gradients = ours.value_and_grad(batch)
        ours.close()
        assert loss.item() == pytest.approx(expected, rel=0.02)
        kinds = {value.dtype for _, value in tree_flatten(gradients)}
        assert kinds == {mx.float32}


def test_adapters_load_in_mlx_lm_with_the_same_logits(tmp_path):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from mlx_edgelora.training.adapters import save_adapters

    folder = save(tmp_path, "llama", True)
    ours = engine(folder, streamed=False, kernel="fused")
    weights = dict(tree_flatten(ours.model.trainable_parameters()))
    settings = {
        "fine_tune_type": "lora",
        "num_layers": len(ours.model.layers),
        "lora_parameters": {"rank": 4, "scale": 3.0, "dropout": 0.0},
    }
    save_adapters(tmp_path / "adapter", weights, settings)
    theirs, _ = load_model(folder)
    theirs = load_adapters(theirs, str(tmp_path / "adapter"))
    tokens = mx.array([[5, 7, 11, 13, 17]])
    assert mx.abs(theirs(tokens) - ours.model(tokens)).max().item() < 1e-5
    ours.close()


@pytest.mark.parametrize("in_use", [1, 2])
@pytest.mark.parametrize("streamed", [1, 2, 3])
def test_weights_are_read_into_as_many_buffers_as_are_in_use(streamed, in_use, tmp_path):
    """And one for what is read ahead, however many blocks stay in memory between two visits."""
    folder = save(tmp_path, "llama", True)
    with closing(engine(folder, streamed_blocks=streamed, spilled=False)) as ours:
        weights, buffers = ours.walk.weights, set()
        weights.in_use = in_use
        forward = [(0, 1), (1, 2), (2, None)]
        backward = [(2, 1), (1, 0), (0, None)]
        for step in range(4):
            for index, following in forward + backward:
                arrays = weights.block(index)
                if following is not None:
                    weights.prefetch(following)
                if step and index < streamed:
                    buffers.add(to_numpy(next(iter(arrays.values()))).ctypes.data)
    assert len(buffers) <= min(streamed + in_use - 1, in_use + 1)


def test_blocks_that_stay_in_memory_are_read_once(tmp_path):
    folder = save(tmp_path, "llama", True)
    read = []
    with closing(engine(folder, streamed_blocks=1, spilled=False)) as ours:
        for _ in range(3):
            before = ours.disk.read_bytes
            ours.value_and_grad(random_batch())
            read.append(ours.disk.read_bytes - before)
        weights = ours.walk.weights
        assert not weights.block(2).keys() - weights.block(1).keys()
        assert read[1] == read[2] < read[0]
        weights.set_resident_from(3)  # a plan that was corrected
        before = ours.disk.read_bytes
        ours.value_and_grad(random_batch())
        assert ours.disk.read_bytes - before > read[2]
