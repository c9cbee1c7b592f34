"""The safetensors container: every lie in a header is refused, rows and writing are exact."""

import json
import re
import struct

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    RowReader,
    TensorInfo,
    read_header,
    to_numpy,
    write_tensors,
)

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
}
EXPECTED = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([9, 8, 7, 6, 5], np.uint8),
}
DATA = EXPECTED["a"].tobytes() + EXPECTED["b"].tobytes()


def container(header, data=DATA, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refused(path, match):
    """The error is ours, names the file first and says `match`."""
    with pytest.raises(EdgeLoraError, match=re.escape(str(path)) + ".*" + match):
        read_header(path)


def test_header_of_a_good_file(path):
    path.write_bytes(container({"__metadata__": {"format": "mlx"}} | GOOD))
    base = path.stat().st_size - len(DATA)
    assert read_header(path) == {
        "a": TensorInfo("F32", (2, 3), base, base + 24),
        "b": TensorInfo("U8", (5,), base + 24, base + 29),
    }


def test_offsets_may_come_in_any_order_and_tensors_may_be_empty(path):
    empty = {"dtype": "F32", "shape": [0, 7], "data_offsets": [24, 24]}
    path.write_bytes(container({"b": GOOD["b"], "empty": empty, "a": GOOD["a"]}))
    assert list(read_header(path)) == ["b", "empty", "a"]


def test_every_truncation_is_refused(path):
    whole = container(GOOD)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, "damaged safetensors file")


def test_every_flipped_bit_of_the_header_is_refused_or_harmless(path):
    """Only a name may change unseen; shapes, dtypes' sizes and places never."""
    whole = container(GOOD)
    refusals = 0
    for bit in range(8 * (len(whole) - len(DATA))):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensors = read_header(path)
        except EdgeLoraError as error:
            assert str(path) in str(error)
            refusals += 1
            continue
        base = len(whole) - len(DATA)
        places = [(t.start - base, t.stop - base) for t in tensors.values()]
        sizes = [np.prod(t.shape) * DTYPES[t.dtype][0].size for t in tensors.values()]
        assert places == [(0, 24), (24, 29)]
        assert sizes == [24, 5]
    assert refusals > 0.8 * bit


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "U8"}}', "a name occurs twice"),
        ({"a": None}, "tensor 'a' lacks"),
        ({"a": []}, "tensor 'a' lacks"),
        ({"a": "F32"}, "tensor 'a' lacks"),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "tensor 'a' lacks"),
        ({"a": GOOD["a"] | {"data_offsets": [0]}}, "tensor 'a' lacks"),
        ({"a": GOOD["a"] | {"data_offsets": [0, 24, 29]}}, "tensor 'a' lacks"),
        ({"a": GOOD["a"] | {"data_offsets": None}}, "tensor 'a' lacks"),
        ({"a": GOOD["a"] | {"dtype": "F8_E5M2"}}, "dtype 'F8_E5M2', expected one of BOOL"),
        ({"a": GOOD["a"] | {"dtype": 4}}, "dtype 4, expected one of BOOL"),
        ({"a": GOOD["a"] | {"dtype": ["F32"]}}, r"dtype \['F32'\], expected one of BOOL"),
        ({"a": GOOD["a"] | {"shape": "23"}}, "not counts"),
        ({"a": GOOD["a"] | {"shape": [-2, -3]}}, "not counts"),
        ({"a": GOOD["a"] | {"shape": [True, 6]}}, "not counts"),
        ({"a": GOOD["a"] | {"shape": [2.0, 3]}}, "not counts"),
        ({"a": GOOD["a"] | {"shape": [2**62, 3]}}, "not counts"),
        ({"a": GOOD["a"] | {"shape": [[2], 3]}}, "not counts"),
        ({"a": GOOD["a"] | {"data_offsets": [False, 24]}}, "not counts"),
        ({"a": GOOD["a"] | {"data_offsets": [-24, 0]}}, "not counts"),
        ({"a": GOOD["a"] | {"data_offsets": ["0", "24"]}}, "not counts"),
        ({"a": GOOD["a"] | {"shape": [2, 4]}}, "'a' spans 24 bytes, its shape needs 32"),
        ({"a": GOOD["a"] | {"shape": [2**40, 2**40]}}, "spans 24 bytes"),
        ({"a": GOOD["a"] | {"dtype": "F16"}}, "spans 24 bytes, its shape needs 12"),
        ({"a": GOOD["a"] | {"data_offsets": [24, 0]}}, "spans -24 bytes"),
        ({"b": GOOD["b"]}, "'b' starts at byte"),
        (GOOD | {"b": GOOD["b"] | {"data_offsets": [23, 28]}}, "'b' starts at byte"),
        (GOOD | {"b": GOOD["b"] | {"data_offsets": [25, 30]}}, "'b' starts at byte"),
        (GOOD | {"c": GOOD["a"]}, "'c' starts at byte"),
        ({"a": GOOD["a"]}, "bytes long, expected"),
        ({}, "bytes long, expected"),
    ],
    ids=str,
)
def test_lies_are_refused(path, header, match):
    path.write_bytes(container(header))
    refused(path, match)


def test_trailing_bytes_are_refused(path):
    path.write_bytes(container(GOOD, DATA + b"x"))
    refused(path, "bytes long, expected")


@pytest.mark.parametrize("length", [2**63, MAX_HEADER_BYTES + 1, len(json.dumps(GOOD)) + 1000])
def test_header_length_beyond_the_file_is_refused_before_it_is_read(path, length):
    path.write_bytes(container(GOOD, length=length))
    refused(path, f"header claims {length} bytes")


def test_missing_file_says_so(path):
    refused(path, "cannot be read .No such file")


def values(name: str, shape: tuple) -> tuple[mx.array, np.ndarray]:
    """An array of a dtype, and its bytes as NumPy holds them."""
    dtype, kind = DTYPES[name]
    rng = np.random.RandomState(0)
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    raw = np.frombuffer(rng.bytes(size), kind).reshape(shape)
    raw = raw % 2 if name == "BOOL" else raw
    array = mx.array(raw)
    return (array.astype(dtype) if name == "BOOL" else array.view(dtype)), raw


def written(path, arrays: dict[str, mx.array]):
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with path.open("wb") as file:
        write_tensors(file, specs, iter(arrays.values()))
    return read_header(path)


def bits(array: mx.array) -> bytes:
    mx.eval(array)
    return to_numpy(array).tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_rows_of_every_dtype(path, name):
    array, raw = values(name, (7, 3, 2))
    entries = {
        "before": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": name, "shape": [7, 3, 2], "data_offsets": [3, 3 + raw.nbytes]},
        "after": {"dtype": "U8", "shape": [1], "data_offsets": [3 + raw.nbytes, 4 + raw.nbytes]},
    }
    path.write_bytes(container(entries, b"abc" + raw.tobytes() + b"d"))
    reader = RowReader(path, read_header(path)["x"])
    indices = np.array([5, 0, 5, 6, 2, 2])
    taken, part = reader.take(indices), reader.slice(2, 5)
    assert (taken.dtype, taken.shape) == (array.dtype, (6, 3, 2))
    assert (part.dtype, part.shape) == (array.dtype, (3, 3, 2))
    assert bits(taken) == raw[indices].tobytes()
    assert bits(part) == raw[2:5].tobytes()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 5))
def test_any_rows(path, data, rows, columns):
    array = mx.random.normal((rows, columns))
    reader = RowReader(path, written(path, {"x": array})["x"])
    indices = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=12)), int)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert np.array_equal(np.array(reader.take(indices)), np.array(array)[indices])
    assert np.array_equal(np.array(reader.slice(start, stop)), np.array(array)[start:stop])


def test_rows_of_a_file_truncated_after_opening(path):
    reader = RowReader(path, written(path, {"x": mx.ones((100, 100))})["x"])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert reader.take(np.array([98])).sum().item() == 100
    with pytest.raises(EdgeLoraError, match=r"safetensors: ends too early"):
        reader.take(np.array([0, 99]))
    with pytest.raises(EdgeLoraError, match=r"safetensors: ends too early"):
        reader.slice(0, 100)
    path.unlink()
    with pytest.raises(EdgeLoraError, match=r"safetensors: cannot be read any more .No such file"):
        reader.take(np.array([0]))


@pytest.mark.parametrize(
    ("row", "read"),
    [
        (100, lambda reader: reader.slice(90, 101)),
        (-3, lambda reader: reader.slice(-3, 5)),
        (-1, lambda reader: reader.take(np.array([0, -1]))),
        (100, lambda reader: reader.take(np.array([99, 100]))),
    ],
)
def test_rows_outside_the_tensor_are_not_read(path, row, read):
    """Other tensors' bytes would be returned as if they were rows."""
    info = written(path, {"a": mx.ones((100, 4)), "x": mx.ones((100, 4)), "b": mx.ones((100, 4))})
    with pytest.raises(
        EdgeLoraError, match=rf"row {row} is outside of the tensor, which has 100 rows"
    ):
        read(RowReader(path, info["x"]))


def test_round_trip_through_mlx(path):
    arrays = {name: values(name, (3, 5))[0] for name in DTYPES if name != "F8_E4M3"}
    arrays |= {"scalar": mx.array(3.5), "empty": mx.zeros((0, 4)), "long name" * 9: mx.ones((1,))}
    written(path, arrays)
    read, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert bits(read[name]) == bits(array)


def test_strided_arrays_are_written_row_by_row(path):
    base = mx.arange(24).reshape(4, 6)
    arrays = {"turned": base.T, "part": base[1:3, ::2], "broad": mx.broadcast_to(base[0], (5, 6))}
    written(path, arrays)
    read = mx.load(str(path))
    assert all(mx.array_equal(read[name], array).item() for name, array in arrays.items())


def test_writing_costs_one_tensor(path, memory):
    shape, count = (256, 1024), 24  # 1 MiB each

    def computed():
        for index in range(count):
            yield mx.full(shape, index, mx.float32)

    specs = {str(index): (mx.float32, shape) for index in range(count)}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with path.open("wb") as file:
        write_tensors(file, specs, computed())
    assert mx.get_peak_memory() - before < 3 * 2**20
    assert path.stat().st_size > count * 2**20
    last = mx.load(str(path))[str(count - 1)]
    assert mx.all(last == count - 1).item()
