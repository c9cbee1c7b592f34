"""Sections of a scratch file: arrays of every dtype come back, and stay where they were put."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edgelora.measure.meter import DiskMeter
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
    with pytest.raises(ValueError, match=r"a: .*its place in the file is for .*float32 \(4,\)"):
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
