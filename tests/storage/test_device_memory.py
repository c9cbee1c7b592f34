import ctypes

import mlx.core as mx
import numpy as np
import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage import device_memory
from mlx_edgelora.storage.device_memory import GpuMemory, HostMemory, MappedPart, Part, to_numpy


class FakeDriver:
    """CUDA's driver on a machine without one: its memory is the host's."""

    def __init__(self):
        self.calls, self.locked = [], []

    def cuMemcpyAsync(self, target, source, size, stream):
        self.calls.append(size.value)
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cuMemHostAlloc(self, pointer, size, flags):
        self.locked.append((ctypes.c_char * size.value)())
        pointer._obj.value = ctypes.addressof(self.locked[-1])
        return 0

    def __getattr__(self, name):
        return lambda *arguments: 0


@pytest.fixture(params=["host", "gpu"])
def memory(request, monkeypatch):
    monkeypatch.setattr(device_memory, "PIECE", 1000)
    return HostMemory() if request.param == "host" else GpuMemory(FakeDriver())


@pytest.fixture
def bytes_and_file(tmp_path):
    expected = np.random.RandomState(0).randint(0, 256, 10_007).astype(np.uint8)
    path = tmp_path / "numbers"
    path.write_bytes(expected.tobytes())
    with path.open("rb") as file:
        yield expected, path, file.fileno()


def views_of(array, sizes):
    whole, views, at = memoryview(to_numpy(array)).cast("B"), [], 0
    for size in sizes:
        views.append(whole[at : at + size])
        at += size
    return views


def test_parts_of_a_file_land_in_the_arrays(memory, bytes_and_file):
    expected, path, descriptor = bytes_and_file
    array = mx.zeros((10_000,), mx.uint8)
    mx.eval(array)
    sizes, starts = [1, 2999, 0, 1000, 6000], [7, 3000, 5, 1, 4007]
    views = views_of(array, sizes)
    memory.hold(views[1])
    memory.fill([Part(path, descriptor, s, v) for s, v in zip(starts, views, strict=True)])
    wanted = np.concatenate([expected[s : s + n] for s, n in zip(starts, sizes, strict=True)])
    assert np.array_equal(np.array(array), wanted)


def test_rows_that_are_consecutive_in_memory_are_copied_together(bytes_and_file):
    expected, path, descriptor = bytes_and_file
    driver = FakeDriver()
    array = mx.zeros((600, 3), mx.uint8)
    mx.eval(array)
    views = views_of(array, [3] * 600)
    GpuMemory(driver).fill([Part(path, descriptor, 7 * n, v) for n, v in enumerate(views)])
    assert driver.calls == [1800]
    wanted = np.stack([expected[7 * n : 7 * n + 3] for n in range(600)])
    assert np.array_equal(np.array(array), wanted)


def test_a_copy_does_not_reach_from_one_array_into_the_next(bytes_and_file):
    """CUDA refuses to, even if their addresses follow each other."""
    _, path, descriptor = bytes_and_file
    driver, memory = FakeDriver(), bytearray(100)
    views = [memoryview(np.frombuffer(memory, np.uint8, 50, start)) for start in (0, 50)]
    GpuMemory(driver).fill([Part(path, descriptor, 0, view) for view in views])
    assert driver.calls == [50, 50]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_file_that_ends_too_early_is_an_error(memory, bytes_and_file, parts):
    _, path, descriptor = bytes_and_file
    array = mx.zeros((4000,), mx.uint8)
    mx.eval(array)
    views = views_of(array, [4000 // parts] * parts)
    with pytest.raises(EdgeLoraError, match="numbers: ends too early"):
        memory.fill([Part(path, descriptor, 9_500, view) for view in views])


def test_a_file_that_cannot_be_read_is_an_error(memory, tmp_path):
    array = mx.zeros((8,), mx.uint8)
    mx.eval(array)
    with pytest.raises(EdgeLoraError, match=r"gone: cannot be read any more .Bad file descriptor"):
        memory.fill([Part(tmp_path / "gone", 9_999, 0, views_of(array, [8])[0])])


def test_mapped_pages_are_copied_to_arrays_and_back(memory):
    pages = np.random.RandomState(1).randint(0, 256, 4321).astype(np.uint8)
    array = mx.zeros((4321,), mx.uint8)
    mx.eval(array)
    (view,) = views_of(array, [4321])
    memory.fill([MappedPart(pages, view)])
    assert np.array_equal(np.array(array), pages)
    back = np.zeros_like(pages)
    memory.save(view, memoryview(back))
    assert np.array_equal(back, pages)


def test_arrays_of_several_dtypes_are_stored_and_loaded(memory):
    keys = mx.random.split(mx.random.key(0), 4)
    arrays = {
        "a": mx.random.normal((3, 5), key=keys[0]),
        "b": mx.random.normal((7,), key=keys[1]).astype(mx.bfloat16),
        "none": mx.zeros((0, 4)),
        "c": mx.random.randint(0, 9, (2, 3, 5), key=keys[2]).astype(mx.uint32),
        "row": mx.random.normal((4, 6), key=keys[3]).T,
    }
    mx.eval(arrays)
    bits = {mx.float32: np.float32, mx.bfloat16: np.uint16, mx.uint32: np.uint32}
    pages = {name: np.zeros(a.shape, bits[a.dtype]) for name, a in arrays.items()}
    memory.store([(array, pages[name]) for name, array in arrays.items()])
    found = memory.load({name: (pages[name], array.dtype) for name, array in arrays.items()})
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert mx.array_equal(found[name], array), name
    pages["a"][...] = 0
    assert mx.array_equal(found["a"], arrays["a"])  # a copy
    assert memory.load({}) == {}
    memory.store([])


def test_a_driver_that_refuses_is_not_used(monkeypatch):
    class Refusing(FakeDriver):
        def cuInit(self, flags):
            return 100

    with pytest.raises(OSError, match="cuInit failed with status 100"):
        GpuMemory(Refusing())
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "new_stream", lambda device: mx.default_stream(mx.cpu))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Refusing())
    assert isinstance(device_memory.device_memory.__wrapped__(), HostMemory)

    class Forgetting(FakeDriver):
        def cuMemcpyAsync(self, target, source, size, stream):
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Forgetting())
    assert isinstance(device_memory.device_memory.__wrapped__(), HostMemory)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    assert isinstance(device_memory.device_memory.__wrapped__(), GpuMemory)
