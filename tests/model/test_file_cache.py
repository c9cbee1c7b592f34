"""Weights that the system cannot keep in its cache are read past it, on macOS."""

import fcntl
import os
from contextlib import closing

import mlx.core as mx
import pytest
from harness import save

from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.model.loading import attach, open_model

F_NOCACHE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "llama", quantized=True)


@pytest.fixture
def advised(monkeypatch):
    """Descriptors that the system was told something of, as on macOS."""
    found = []
    monkeypatch.setattr(fcntl, "F_NOCACHE", F_NOCACHE, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *args: found.append(args))
    return found


def weights(folder, file_cache, streamed_blocks=None):
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder / "cache")
    return attach(
        lazy,
        streamed=True,
        dtype=None,
        meter=DiskMeter(),
        streamed_blocks=streamed_blocks,
        file_cache=file_cache,
    ).weights


def read(folder, file_cache, streamed_blocks=None):
    """Bytes of the blocks, and their arrays."""
    with closing(weights(folder, file_cache, streamed_blocks)) as source:
        blocks = [source.block(index, own_memory=True) for index in range(3)]
        shards = {os.fstat(descriptor).st_ino for descriptor in source._descriptors.values()}
        assert len(shards) == len(source._descriptors) == 1
        return sum(a.nbytes for block in blocks for a in block.values()), blocks


def test_blocks_that_do_not_fit_are_read_past_the_cache(folder, advised):
    size, cached = read(folder, None)
    assert not advised
    _, blocks = read(folder, size - 1)
    assert [(command, value) for _, command, value in advised] == [(F_NOCACHE, 1)]  # one shard
    for block, expected in zip(blocks, cached, strict=True):
        assert all(mx.array_equal(block[name], expected[name]).item() for name in expected)


def test_blocks_that_fit_are_left_to_the_cache(folder, advised):
    size, _ = read(folder, None)
    read(folder, size)
    read(folder, size // 2, streamed_blocks=1)  # the others are read once
    assert not advised


def test_a_system_without_such_a_way_is_not_told(folder, monkeypatch):
    monkeypatch.delattr(fcntl, "F_NOCACHE", raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *_: pytest.fail("nothing is to be told"))
    read(folder, 0)
