"""Rows in memory and in a file: the same as those of a NumPy matrix."""

from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest

from mlx_edgelora.engine.hidden import Slots
from mlx_edgelora.engine.rows import HeldRows, StoredRows
from mlx_edgelora.storage.stores import MappedStore

WIDTH = 7
TILES = (5, 1, 9)  # rows


@pytest.fixture(params=["memory", "file", "file of small slots"])
def make(request, tmp_path):
    """A function that makes empty rows of a dtype."""
    if request.param == "memory":
        yield lambda dtype: HeldRows(WIDTH, dtype)
        return
    with closing(MappedStore(tmp_path)) as store:
        # Of three rows, so that a tile takes several; or of less than one, which slots grow for.
        slots = Slots(store, 2, 4 if "small" in request.param else 3 * 4 * WIDTH)
        yield lambda dtype: StoredRows(WIDTH, dtype, slots)


def matrix(dtype, key=1):
    return mx.random.normal((sum(TILES), WIDTH), key=mx.random.key(key)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_tiles_and_rows_are_what_was_written(make, dtype):
    whole, rows, start = matrix(dtype), make(dtype), 0
    for count in TILES:
        rows.append(whole[start : start + count])
        start += count
    some = np.array([14, 0, 5, 6, 6, 4])
    assert mx.array_equal(rows.take(some), whole[mx.array(some)])
    assert rows.take(some).dtype == dtype
    other = matrix(dtype, 2)
    places = np.array([3, 14, 5])
    rows.put(places, other[mx.array(places)])
    whole[mx.array(places)] = other[mx.array(places)]
    assert mx.array_equal(rows.tile(0), whole[:5])
    assert mx.array_equal(rows.tile(1), whole[5:6])
    assert mx.array_equal(rows.tile(2), whole[6:])
    rows.forget()


def test_rows_that_are_added_to_twice_count_twice(make):
    rows = make(mx.float32)
    stale = make(mx.float32)
    stale.append(matrix(mx.float32))
    stale.forget()  # what is in a slot of a file is no part of the next rows
    for count in TILES:
        rows.extend(count)
    places, values = np.array([2, 14, 2, 8]), matrix(mx.float32)[:4]
    rows.add(places, values)
    expected = np.zeros((sum(TILES), WIDTH), np.float32)
    np.add.at(expected, places, np.array(values))
    found = mx.concatenate([rows.tile(number) for number in range(len(TILES))])
    assert np.array_equal(np.array(found), expected)
    rows.forget()


def test_slots_are_given_back(tmp_path):
    with closing(MappedStore(tmp_path)) as store:
        slots = Slots(store, 2, 3 * 4 * WIDTH)
        for _ in range(2):
            rows = StoredRows(WIDTH, mx.float32, slots)
            rows.append(matrix(mx.float32))
            rows.forget()
        assert slots._count == 5  # of three rows each
