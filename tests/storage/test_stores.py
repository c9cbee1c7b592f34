"""One contract for every activation store; what the mapped file does to disk and memory."""

import errno
import os
import signal
import stat
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter, footprint
from mlx_edgelora.storage import stores
from mlx_edgelora.storage.stores import MappedStore, RamStore

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
DTYPES = [
    *(mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.uint64),
    *(mx.int64, mx.float16, mx.bfloat16, mx.float32, mx.complex64),
]
SHAPES = [(), (1,), (3,), (7, 5, 3), (1, 65, 64), (2, 0, 3)]


@pytest.fixture(params=["ram", "mapped", "written", "wrapped"])
def store(request, tmp_path, monkeypatch):
    """RAM; a file; one where space cannot be reserved; one that MLX wraps (as on Metal)."""
    if request.param == "written":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    if request.param == "wrapped":
        monkeypatch.setattr(mx, "asarray", lambda array, copy: mx.array(array), raising=False)
    made = RamStore() if request.param == "ram" else MappedStore(tmp_path)
    yield made
    if request.param == "wrapped":
        assert made._wraps
    made.close()


def random(shape, dtype, seed):
    array = mx.random.uniform(-100, 100, shape, key=mx.random.key(seed))
    array = array > 0 if dtype == mx.bool_ else mx.abs(array).astype(dtype)
    mx.eval(array)
    return array


def same(got, expected) -> bool:
    return (got.dtype, got.shape) == (expected.dtype, expected.shape) and np.array_equal(
        np.array(got.astype(mx.complex64)), np.array(expected.astype(mx.complex64))
    )


def test_a_slot_that_is_forgotten_holds_what_is_put_next(store):
    first, second = (random((7, 5), mx.float32, seed) for seed in (0, 1))
    store.reserve(2, first.nbytes)
    store.forget(0)  # nothing is there
    store.put(0, first)
    store.prefetch(0)
    store.forget(0)
    store.put(0, second)
    assert same(store.take(0), second)
    store.put(1, first)
    store.forget(1)
    with pytest.raises(KeyError):
        store.take(1)


def test_memory_lets_go_of_what_is_forgotten(memory):
    store, before = RamStore(), mx.get_active_memory()
    store.put(0, random((2**18,), mx.float32, 0))
    store.forget(0)
    assert mx.get_active_memory() - before < MIB


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_come_back_in_any_order(store, dtype, prefetch):
    arrays = [random(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    store.reserve(len(arrays), max(array.nbytes for array in arrays))
    for slot in (2, 0, 5, 1, 4, 3):
        store.put(slot, arrays[slot])
    for slot in (4, 5, 0, 3, 1, 2):
        if prefetch:
            store.prefetch(slot)
            store.prefetch((slot + 1) % 6)  # taken later, earlier or never
        assert same(store.take(slot), arrays[slot])


def test_many_rounds_with_more_and_less_room(store):
    rng = np.random.RandomState(3)
    for round_ in range(25):
        slots, size = rng.randint(1, 7), rng.randint(1, 40_000)
        store.reserve(slots, 4 * size)
        arrays = [random((rng.randint(1, size + 1),), mx.float32, round_) for _ in range(slots)]
        for slot, array in enumerate(arrays):
            store.put(slot, array)
        # Now and then a round is broken off, as by an error in a block.
        for slot in range(slots - 1, rng.randint(-1, slots), -1):
            if slot:
                store.prefetch(slot - 1)
            assert same(store.take(slot), arrays[slot])


def test_what_is_taken_is_gone(store):
    store.reserve(2, 16)
    store.put(0, mx.ones((4,)))
    store.put(1, mx.ones((4,)))
    store.take(0)
    with pytest.raises(KeyError):
        store.take(0)
    store.reserve(2, 16)
    with pytest.raises(KeyError):
        store.take(1)


def test_strided_arrays_come_back_whole(store):
    array = mx.arange(24).reshape(4, 6).T[::2]
    mx.eval(array)
    store.reserve(1, array.nbytes)
    store.put(0, array)
    assert same(store.take(0), array)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_array_changed_in_place_after_put_comes_back_as_it_was(store, dtype):
    """A block may do `x += attention(x)` to its input, which the backward needs as it came."""
    store.reserve(8, 4 * MIB)
    for slot in range(8):
        array = mx.full((MIB,), slot, dtype)
        mx.eval(array)
        store.put(slot, array)
        array += 100
        mx.eval(array)
        assert array[0].item() == slot + 100
    for slot in range(8):
        assert mx.all(store.take(slot) == slot).item()


def test_mapped_store_counts_bytes(tmp_path):
    meter = DiskMeter()
    store = MappedStore(tmp_path, meter)
    store.reserve(2, 4000)
    store.put(0, mx.ones((1000,)))
    store.put(1, mx.ones((10,), mx.bfloat16))
    store.take(1)
    assert meter.written_bytes == 4020
    assert meter.read_bytes == 20
    store.close()


def test_arrays_larger_than_reserved_get_room_of_their_own(tmp_path):
    """The first block's input may be narrower than the others': bfloat16 rows, float32 blocks."""
    store = MappedStore(tmp_path)
    for size in (1, stores.PAGE):  # the file is used again for every pass
        store.reserve(3, size)
        arrays = [mx.random.normal((stores.PAGE + n,)) for n in (0, 70, 5000)]
        mx.eval(arrays)
        store.put(0, mx.zeros((size,), mx.uint8))
        for slot, array in enumerate(arrays):
            store.put(slot, array)
        store.put(1, arrays[1] + 1)
        store.prefetch(2)
        for slot in (2, 0):
            assert mx.array_equal(store.take(slot), arrays[slot]).item()
        assert mx.array_equal(store.take(1), arrays[1] + 1).item()
    store.close()


@pytest.mark.parametrize("ask", ["take", "put", "reserve", "close"])
def test_failed_write_surfaces_and_close_still_frees(tmp_path, monkeypatch, ask):
    store = MappedStore(tmp_path)
    store.reserve(2, 16)

    def failing(slot):
        raise OSError("the disk is gone")

    monkeypatch.setattr(store, "_drop_pages", failing)
    store.put(0, mx.ones((4,)))
    arguments = {"take": [0], "put": [1, mx.ones((4,))], "reserve": [2, 16], "close": []}[ask]
    with pytest.raises(OSError, match="the disk is gone"):
        getattr(store, ask)(*arguments)
    if ask != "close":
        store.close()
    assert store._file.closed
    assert store._worker._shutdown


def test_failed_read_surfaces(tmp_path, monkeypatch):
    store = MappedStore(tmp_path)
    store.reserve(1, 16)
    store.put(0, mx.ones((4,)))
    store._wait_for_write()
    monkeypatch.setattr(store, "_region", lambda slot, nbytes: np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="different structures"):
        store.take(0)
    store.close()


@LINUX
def test_file_is_private_and_has_no_name(tmp_path):
    store = MappedStore(tmp_path)
    store.reserve(1, MIB)
    store.put(0, mx.ones((100,)))
    descriptor = store._file.fileno()
    assert os.readlink(f"/proc/self/fd/{descriptor}").endswith(" (deleted)")
    status = os.fstat(descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert (status.st_nlink, status.st_size) == (0, MIB)
    assert status.st_blocks * 512 >= MIB  # taken, not a hole
    assert list(tmp_path.iterdir()) == []
    store.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
import mlx.core as mx
from mlx_edgelora.storage.stores import MappedStore
store = MappedStore(sys.argv[1])
store.reserve(4, 2**20)
store.put(0, mx.ones((2**18,)))
print("ready", flush=True)
time.sleep(60)
"""


def test_nothing_is_left_after_kill_9(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def resident_growth(store) -> int:
    """What 64 MiB put into a store add to this process."""
    store.reserve(16, 4 * MIB)
    before = footprint()
    for slot in range(16):
        array = mx.full((MIB,), slot, mx.float32)
        mx.eval(array)
        store.put(slot, array)
        del array
    store._wait_for_write()
    return footprint() - before


@LINUX
def test_spilling_lowers_resident_memory(tmp_path, memory):
    store = MappedStore(tmp_path)
    assert resident_growth(store) < 20 * MIB
    before = footprint()
    for slot in range(15, -1, -1):
        assert store.take(slot)[-1].item() == slot
    assert footprint() - before < 20 * MIB
    store.close()


@LINUX
def test_pages_that_are_kept_would_be_seen(tmp_path, memory, monkeypatch):
    store = MappedStore(tmp_path)
    monkeypatch.setattr(store, "_drop_pages", lambda slot: None)
    assert resident_growth(store) > 56 * MIB
    store.close()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("reserving", [True, False])
def test_full_disk_is_one_sentence(tmp_path, monkeypatch, reserving):
    store = MappedStore(tmp_path)
    if reserving:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EdgeLoraError, match=r"needs 12.6 MB there .*[MG]B are free.*--spill-dir"):
        store.reserve(3, 4 * MIB)
    store.close()


def test_space_is_taken_even_where_writes_come_short(tmp_path, monkeypatch):
    """A hole left at the end would kill the process when it is written to on a full disk."""
    write = os.pwrite
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:300_001], at))
    store = MappedStore(tmp_path)
    store.reserve(3, MIB)
    assert os.fstat(store._file.fileno()).st_blocks * 512 >= 3 * MIB
    store.close()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_folder_that_takes_no_file_is_named(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "file":
        folder.write_text("not a folder")
    with pytest.raises(EdgeLoraError, match=rf"{folder}: no scratch file can be created .*--spill"):
        MappedStore(folder)
