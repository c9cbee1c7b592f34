"""What paging saves: neither MLX's peak nor the process grows with the number of blocks."""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from architectures import add_lora, build
from harness import random_batch
from mlx.utils import tree_flatten

from mlx_edgelora.memory.blockwise import BlockWalk
from mlx_edgelora.memory.meter import DiskMeter, footprint
from mlx_edgelora.memory.page_file import PageFile
from mlx_edgelora.memory.stores import MappedStore
from mlx_edgelora.training.finite import first_non_finite
from mlx_edgelora.training.optimizer import clip_factor
from mlx_edgelora.training.paged import PagedTrained
from mlx_edgelora.training.step import Engine
from mlx_edgelora.training.trained import ResidentTrained

MIB = 2**20


def step_peaks(depth, steps, folder, paged):
    """Peak bytes of each whole step above the frozen weights: two batches and a clipped update."""
    model = build(
        "llama",
        num_hidden_layers=depth,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=8,
        tie_word_embeddings=True,
        vocab_size=256,
    )
    add_lora(model)
    adapters = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    frozen = sum(value.nbytes for _, value in tree_flatten(model.parameters())) - adapters
    trained = PagedTrained(model, folder) if paged else ResidentTrained(model)
    store, optimizer = MappedStore(folder), optimizers.AdamW(1e-4)
    walk = BlockWalk(model, store, adapters=trained)
    engine = Engine(model, walk, None, DiskMeter(), trained=trained)
    trained.start(optimizer)
    batch, peaks = random_batch(1, 128, 256, share=0.1), []

    def sink(gradients):
        assert first_non_finite(gradients) is None
        trained.add(gradients)

    for _ in range(steps + 1):
        mx.reset_peak_memory()
        for _ in range(2):
            engine.backward(batch, sink)
        trained.update(optimizer, 2, clip_factor(trained.norm(2), 0.1))
        peaks.append(mx.get_peak_memory() - frozen)
    engine.close()
    trained.close()
    return peaks[1:], adapters


def growth(folder, paged):
    """Lowest peak of 16 blocks over the highest of 4, and the bytes of 12 blocks' adapters.

    See `growth_beyond_adapters` of test_blockwise for why these two.
    """
    low, few = step_peaks(4, 6, folder, paged)
    high, many = step_peaks(16, 2, folder, paged)
    return min(high) - max(low), many - few


def test_peak_of_a_step_does_not_grow_with_depth(memory, tmp_path):
    grown, _ = growth(tmp_path, paged=True)
    assert grown < 2048  # a few scalars a block


def test_the_same_measurement_sees_adapters_in_memory(memory, tmp_path):
    grown, adapters = growth(tmp_path, paged=False)
    assert grown > 3 * adapters  # parameters, gradients and two moments


class Stack(nn.Module):
    """Blocks of one 1 MiB matrix each, as lazy as `add_lora` leaves adapters."""

    def __init__(self, blocks=16):
        super().__init__()
        self.layers = [nn.Linear(512, 512, bias=False) for _ in range(blocks)]


def rounds(folder):
    """Claim 16 MiB of parameters, update them twice, read them; gives two growths in bytes."""
    mx.clear_cache()
    mx.reset_peak_memory()
    held, before = mx.get_active_memory(), footprint()
    trained, optimizer = PagedTrained(Stack(), folder), optimizers.AdamW(1e-3)
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
    result = mx.get_peak_memory() - held, footprint() - before
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
