"""Reading a spill file in place: whole pages are wrapped, and what is refused is copied."""

import mlx.core as mx
import numpy as np
import pytest
from aliasing import Aliases

from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.storage import stores
from mlx_edgelora.storage.page_file import PAGE
from mlx_edgelora.storage.stores import MappedStore

# Hidden states of 2047 tokens are no whole pages; one byte more than a page is the least.
LENGTHS = [PAGE, PAGE + 1, 3 * PAGE - 2, 2 * PAGE + 12, 5]


@pytest.fixture
def store(tmp_path):
    made = MappedStore(tmp_path, DiskMeter())
    yield made
    made.close()


def data(nbytes, seed=0):
    array = mx.random.randint(0, 256, (nbytes,), key=mx.random.key(seed)).astype(mx.uint8)
    mx.eval(array)
    return array


def round_trips(store, nbytes):
    """Put and take two arrays of so many bytes."""
    store.reserve(2, nbytes)
    arrays = [data(nbytes, seed) for seed in (0, 1)]
    for slot, array in enumerate(arrays):
        store.put(slot, array)
    store.prefetch(1)
    assert mx.array_equal(store.take(1), arrays[1]).item()
    assert mx.array_equal(store.take(0, keep=True) + 1, arrays[0] + 1).item()
    assert mx.array_equal(store.take(0), arrays[0]).item()


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_whole_pages_are_wrapped_whatever_the_length(store, monkeypatch, nbytes):
    """A stand-in that refuses what is no whole page, as Metal's documentation has it."""
    aliases = Aliases(monkeypatch, takes=lambda size: size % PAGE == 0)
    round_trips(store, nbytes)
    assert store._wraps and len(aliases.sizes) == 4  # the trial, and three times taken
    assert set(aliases.sizes) == {-(-nbytes // PAGE) * PAGE}
    assert store._meter.read_bytes == 3 * nbytes


def test_what_is_given_sees_what_is_put_later(store, monkeypatch):
    """The stand-in does what Metal does; whoever needs an array longer must copy it."""
    Aliases(monkeypatch)
    first, second = data(PAGE, 0), data(PAGE, 1)
    store.reserve(1, PAGE)
    store.put(0, first)
    given = store.take(0)
    store.put(0, second)
    store._wait_for_write()
    assert mx.array_equal(given, second).item()


def test_every_length_is_tried_once(store, monkeypatch):
    aliases = Aliases(monkeypatch)
    for nbytes in (100, 200, 100, 200, 300):
        store.reserve(2, nbytes)
    assert len(aliases.sizes) == 3


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.bool_, mx.complex64], ids=str)
def test_dtypes_survive(store, monkeypatch, dtype):
    Aliases(monkeypatch)
    array = mx.random.normal((3, 5, 7)).astype(dtype)
    mx.eval(array)
    store.reserve(1, array.nbytes)
    store.put(0, array)
    given = store.take(0)
    assert (given.dtype, given.shape) == (dtype, (3, 5, 7))
    assert mx.array_equal(given, array).item()
    assert store._wraps


@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError, AttributeError])
def test_refused_always_is_copied(store, monkeypatch, error):
    def refusing(*_, **__):
        raise error("[asarray] no")

    monkeypatch.setattr(mx, "asarray", refusing, raising=False)
    for nbytes in LENGTHS:
        round_trips(store, nbytes)
    assert not store._wraps


@pytest.mark.parametrize("kept", [False, True])
def test_refused_later_is_copied_from_then_on(store, monkeypatch, kept):
    """The trial passed; the memory that an array wants is refused when it is taken."""
    refuses = []
    aliases = Aliases(monkeypatch, takes=lambda size: not refuses)
    array = data(PAGE + 3)
    store.reserve(1, array.nbytes)
    store.put(0, array)
    refuses.append(True)
    for keep in (True, kept):
        assert mx.array_equal(store.take(0, keep=keep), array).item()
    assert not store._wraps and len(aliases.sizes) == 1
    refuses.clear()
    round_trips(store, 77)
    assert len(aliases.sizes) == 1
    assert store._meter.read_bytes == 2 * array.nbytes + 3 * 77


def test_wrong_values_are_copied(store, monkeypatch):
    """Memory that is given without an error, but is not the one that was asked for."""
    monkeypatch.setattr(mx, "asarray", lambda region, copy: mx.zeros_like(mx.array(region)))
    round_trips(store, PAGE + 3)
    assert not store._wraps


def test_only_the_last_bytes_are_wrong(store, monkeypatch):
    def cut(region, copy):
        whole = np.array(region)
        whole[-PAGE // whole.itemsize :] = 0  # the page of which a part is used
        return mx.array(whole)

    monkeypatch.setattr(mx, "asarray", cut)
    round_trips(store, 2 * PAGE + 3)
    assert not store._wraps


@pytest.mark.parametrize(("dtype", "wraps"), [(mx.uint8, False), (mx.float32, True)], ids=str)
def test_more_entries_than_a_shape_can_have_are_copied(store, monkeypatch, dtype, wraps):
    """2 GiB of bytes are 2^31 entries, of floats they are 2^29."""
    aliases = Aliases(monkeypatch)
    monkeypatch.setattr(stores, "LARGEST", 4 * PAGE - 1)
    array = mx.random.normal((PAGE,)).view(dtype)
    mx.eval(array)
    store.reserve(1, array.nbytes)
    assert store._wraps and len(aliases.sizes) == 1
    store.put(0, array)
    assert mx.array_equal(store.take(0), array).item()
    assert store._wraps is wraps


def test_arrays_that_were_moved_are_wrapped_too(store, monkeypatch):
    aliases = Aliases(monkeypatch, takes=lambda size: size % PAGE == 0)
    store.reserve(2, 10)
    wide, narrow = data(2 * PAGE + 10), data(10, 1)
    store.put(0, wide)
    store.put(1, narrow)
    assert mx.array_equal(store.take(0), wide).item()
    assert mx.array_equal(store.take(1), narrow).item()
    assert aliases.sizes == [PAGE, 3 * PAGE, PAGE]
