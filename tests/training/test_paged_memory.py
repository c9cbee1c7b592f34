"""What paging saves: neither MLX's peak nor the process grows with the number of blocks."""

import sys
from contextlib import ExitStack, closing

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from architectures import add_lora, narrow_llama
from harness import random_batch
from peaks import ROUNDS, Stepped, growth_with_depth, held, nbytes

from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.finite import first_non_finite
from mlx_edgelora.engine.optimizer import clip_factor
from mlx_edgelora.engine.paged_adapters import PagedAdapterState
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.measure.meter import DiskMeter, footprint
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage.page_file import PageFile
from mlx_edgelora.storage.stores import MappedStore

pytestmark = pytest.mark.slow

MIB = 2**20


@pytest.fixture
def stepped(tmp_path):
    """Models of some depth with their whole step: two batches and a clipped update."""
    with ExitStack() as opened:

        def make(depth, paged):
            return Stepped(lambda: model_of(depth), lambda model: start(model, paged))

        def start(model, paged):
            trained = PagedAdapterState(model, tmp_path) if paged else ResidentAdapterState(model)
            opened.callback(trained.close)
            opened.callback((store := MappedStore(tmp_path)).close)
            walk = Walk(model, store, adapters=trained)
            return step_of(Engine(model, walk, None, DiskMeter(), adapters=trained), trained)

        yield make


def model_of(depth):
    model = narrow_llama(depth)
    add_lora(model)
    return model


def step_of(engine, trained):
    optimizer = optimizers.AdamW(1e-4)
    trained.start(optimizer)
    batch = random_batch(1, 128, 256, share=0.1)

    def sink(gradients):
        assert first_non_finite(gradients) is None
        trained.add(gradients)

    def step():
        for _ in range(2):
            engine.backward(batch, sink)
        trained.update(optimizer, 2, clip_factor(trained.norm(2), 0.1))

    return step


A_FEW_SCALARS_A_BLOCK = 2048


def grown(stepped, paged, rounds=ROUNDS):
    """Growth of the peak from 4 to 16 blocks, and the bytes of 12 blocks' adapters."""
    shallow, deep = stepped(4, paged), stepped(16, paged)
    more = growth_with_depth(shallow, deep, A_FEW_SCALARS_A_BLOCK - 1, rounds)
    return more, deep.trained - shallow.trained


def test_peak_of_a_step_does_not_grow_with_depth(memory, stepped):
    more, _ = grown(stepped, paged=True)
    assert more < A_FEW_SCALARS_A_BLOCK


def test_the_same_measurement_sees_adapters_in_memory(memory, stepped):
    more, adapters = grown(stepped, paged=False, rounds=1)
    assert more > 3 * adapters  # parameters, gradients and two moments


class Stack(nn.Module):
    """Blocks of one 1 MiB matrix each, as lazy as `add_lora` leaves adapters."""

    def __init__(self, blocks=16):
        super().__init__()
        self.layers = [nn.Linear(512, 512, bias=False) for _ in range(blocks)]


def rounds(folder):
    """Claim 16 MiB of parameters, update them twice, read them; gives two growths in bytes."""
    mx.clear_cache()
    before, resident = held(), footprint()
    mx.reset_peak_memory()
    trained, optimizer = PagedAdapterState(Stack(), folder), optimizers.AdamW(1e-3)
    trained.start(optimizer)
    for _ in range(2):
        for index in reversed(range(16)):
            gradient = mx.ones((512, 512))
            mx.eval(gradient)
            trained.add({f"layers.{index}.weight": gradient})
            del gradient
        trained.update(optimizer, 1, clip_factor(trained.norm(1), 1.0))
    for index in range(16):
        trained.block(index)
    assert all(mx.isfinite(value).all().item() for value in trained.weights().values())
    result = mx.get_peak_memory() - before, footprint() - resident
    trained.close()
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="macOS counts other pages")
def test_neither_the_allocator_nor_the_process_holds_more_than_a_block(memory, tmp_path):
    peak, resident = rounds(tmp_path)
    assert peak < 10 * MIB  # of one block; of all it would be four times 16 MiB
    assert resident < 12 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="macOS counts other pages")
def test_pages_that_are_kept_would_be_seen(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(PageFile, "drop", lambda *_: None)
    _, resident = rounds(tmp_path)
    assert resident > 56 * MIB


def test_by_tiles_a_block_reads_its_adapters_once_a_visit(tmp_path):
    """Not for every tile: a step reads each once in the forward and once in the backward."""
    model, meter = model_of(2), DiskMeter()
    size = nbytes(model.trainable_parameters())
    with (
        closing(PagedAdapterState(model, tmp_path, meter)) as trained,
        closing(MappedStore(tmp_path)) as store,
    ):
        plan = Plan(tile_tokens=16, prefetch=False)
        walk = Walk(model, store, adapters=trained, plan=plan)
        assert walk.tile_choice(0, 17).possible
        engine = Engine(model, walk, None, DiskMeter(), adapters=trained)
        engine.value_and_grad(random_batch())  # the first one also tries what can be tiled
        before, gradients = meter.read_bytes, {}
        engine.backward(random_batch(), gradients.update)
    assert meter.read_bytes - before == 2 * size
    assert nbytes(gradients) == size
