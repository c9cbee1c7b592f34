"""Sections of a scratch file: arrays of every dtype come back, and stay where they were put."""

import errno
import os

import mlx.core as mx
import numpy as np
import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.storage import page_file
from mlx_edgelora.storage.page_file import PAGE, PageFile, Section

DTYPES = [mx.float32, mx.bfloat16, mx.float16, mx.uint8, mx.int32, mx.uint64, mx.bool_]


@pytest.fixture
def file(tmp_path):
    made = PageFile(tmp_path, "arrays", "--arrays ram")
    yield made
    made.close()
    assert made.closed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_come_back_from_neighbouring_sections(file, dtype):
    shapes = {"a": (), "b": (3,), ("c", 1): (7, 5, 3), "d": (65, 64)}
    sections, at = [], 0
    for _ in range(2):
        specs = {name: (dtype, shape) for name, shape in shapes.items()}
        sections.append(Section(file, at, specs, DiskMeter()))
        assert sections[-1].specs() == specs
        at = sections[-1].stop
        assert at % PAGE == 0
    file.reserve(at)
    kept = []
    for seed, section in enumerate(sections):
        values = {
            name: (100 * mx.random.uniform(shape=shape, key=mx.random.key(seed))).astype(dtype)
            for name, shape in shapes.items()
        }
        mx.eval(values)
        section.write(values)
        kept.append(values)
    for section, values in zip(sections, kept, strict=True):
        section.prefetch()
        got = section.read()
        assert list(got) == list(values)
        for name, value in values.items():
            for array in (got[name], section.read_one(name)):
                assert (array.dtype, array.shape) == (value.dtype, value.shape)
                assert mx.array_equal(array, value)


def test_what_is_read_is_a_copy(file):
    section = Section(file, 0, {"a": (mx.float32, (4,))}, DiskMeter())
    file.reserve(section.stop)
    section.write({"a": mx.ones((4,))})
    array = section.read()["a"]
    section.write({"a": mx.zeros((4,))})
    assert np.array_equal(np.array(array), np.ones(4))


@pytest.mark.parametrize("wrong", [mx.zeros((5,)), mx.zeros((4,), mx.float16), mx.zeros((2, 2))])
def test_an_array_of_another_kind_is_refused(file, wrong):
    section = Section(file, 0, {"a": (mx.float32, (4,))}, DiskMeter())
    file.reserve(section.stop)
    with pytest.raises(ValueError, match=r"a: got .*, expected .*float32 \(4,\)"):
        section.write({"a": wrong})


def test_a_file_grows_and_keeps_what_it_has(file):
    first = Section(file, 0, {"a": (mx.float32, (4,))}, DiskMeter())
    file.reserve(first.stop)
    first.write({"a": mx.ones((4,))})
    second = Section(file, first.stop, {"a": (mx.float32, (4000,))}, DiskMeter())
    file.reserve(second.stop)
    file.reserve(1)  # never shrinks
    second.write({"a": mx.zeros((4000,))})
    assert mx.array_equal(first.read_one("a"), mx.ones((4,)))
    assert mx.array_equal(second.read_one("a"), mx.zeros((4000,)))


class Preallocation:
    """macOS's way to take disk space for a file; `gives` says how much of it is there."""

    def __init__(self, monkeypatch, gives):
        self.asked, self.written = [], []
        self._gives, write = gives, os.pwrite
        monkeypatch.setattr(page_file.sys, "platform", "darwin")
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(page_file.fcntl, "fcntl", self._fcntl)
        monkeypatch.setattr(os, "pwrite", lambda *args: self.written.append(1) or write(*args))

    def _fcntl(self, descriptor, command, argument):
        assert command == 42 and len(argument) == 32
        flags, mode, offset, length, taken = page_file.FSTORE.unpack(argument)
        assert (flags, mode, offset, taken) == (4, 3, 0, 0)
        self.asked.append(length)
        return page_file.FSTORE.pack(flags, mode, offset, length, self._gives(length))


def no_space(length):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unsupported(length):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_macos_takes_space_without_writing_it(file, monkeypatch):
    system = Preallocation(monkeypatch, gives=lambda length: length)
    file.reserve(3 * PAGE)
    file.reserve(5 * PAGE)
    assert system.asked == [3 * PAGE, 2 * PAGE] and not system.written
    assert os.fstat(file.fileno()).st_size == file.pages.size == 5 * PAGE


@pytest.mark.parametrize("gives", [unsupported, no_space, lambda length: length - 1])
def test_where_macos_takes_no_space_zeros_do(file, monkeypatch, gives):
    system = Preallocation(monkeypatch, gives)
    file.reserve(3 * PAGE)
    assert system.asked == [3 * PAGE] and system.written
    assert os.fstat(file.fileno()).st_blocks * 512 >= 3 * PAGE


def test_a_volume_that_maps_no_files_is_told(file, monkeypatch, tmp_path):
    def refused(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(np, "memmap", refused)
    sentence = rf"{tmp_path}: a file in this folder cannot be mapped into memory \(No such"
    with pytest.raises(EdgeLoraError, match=sentence):
        file.reserve(PAGE)


@pytest.mark.parametrize("at", [0, 7, PAGE - 1])
def test_a_volume_that_loses_what_is_mapped_is_told(file, monkeypatch, tmp_path, at):
    read = os.pread

    def stale(descriptor, count, offset):
        data = bytearray(read(descriptor, count, offset))
        data[at] ^= 1
        return bytes(data)

    monkeypatch.setattr(os, "pread", stale)
    sentence = r"does not reach the file\); choose another folder with --spill-dir, or keep arrays"
    with pytest.raises(EdgeLoraError, match=sentence):
        file.reserve(2 * PAGE)


def test_a_volume_that_cannot_write_back_is_told(file, monkeypatch):
    real = np.memmap

    class Broken:
        def __init__(self, mapped):
            self._mmap, self.view = self, mapped.view

        def flush(self, *_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(np, "memmap", lambda *args, **kinds: Broken(real(*args, **kinds)))
    with pytest.raises(EdgeLoraError, match=r"mapped into memory \(Input/output error\); cho"):
        file.reserve(PAGE)


def test_a_volume_is_tried_once_and_the_file_is_empty_then(file, monkeypatch):
    reads, read = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(1) or read(*args))
    for pages in (1, 2, 3):
        file.reserve(pages * PAGE)
    assert len(reads) == 1 and not file.pages.any()
