import ctypes
import gc
import os
import sys
from pathlib import Path

# Tolerances are those of float32, of which CUDA and an M5 take fewer bits. Before MLX is imported.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import pytest
from hypothesis import settings

from mlx_edgelora.engine.functions import can_compile
from mlx_edgelora.planner import machine
from mlx_edgelora.storage import files

# Helpers that are not tests lie beside them.
sys.path.insert(0, str(Path(__file__).parent))

# The same examples every time: what fails here fails for whoever looks into it. How long one takes
# depends on what else the machine does.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# On a CPU MLX calls a C++ compiler for every fused kernel; tests of compilation ask for it.
mx.disable_compile()


def pytest_configure():
    """Tests that run side by side share the cores; OpenBLAS would take all of them in each."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))  # for processes that tests start
    set_threads = getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)
    if set_threads is not None:
        set_threads(threads)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    """What measures peaks runs alone."""
    for item in items:
        if "memory" in item.fixturenames:
            item.add_marker("alone")


def pytest_collection_finish():
    """Everything is imported: what is there by now is no garbage, which Python need not look for.

    Peaks are measured after a collection of garbage, dozens of times in some tests.
    """
    gc.collect()
    gc.freeze()


# Of a machine with two cores and a fast BLAS.
RATES = machine.Rates(4e10, 2e9, 1e9, 4e9, 2e9, 1e9, 4e-6)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """No run keeps anything in the user's cache, and none plans by how busy this machine is."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(machine, "measure_rates", lambda folder, dtype: RATES)
        yield folder


@pytest.fixture(autouse=True)
def unmeasured(cache):
    """No test finds what another one measured of a model, or compiles because another one does."""
    for file in cache.rglob("measured.json"):
        file.unlink()
    mx.disable_compile()
    can_compile.cache_clear()


@pytest.fixture
def compiles(unmeasured):
    """MLX compiles, for one test."""
    mx.enable_compile()
    can_compile.cache_clear()


@pytest.fixture(autouse=True)
def seed():
    mx.random.seed(0)


@pytest.fixture(autouse=True)
def closed_engines():
    """A test that fails before it closes its engine fails alone."""
    yield
    from harness import close_engines

    close_engines()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model and data for it on disk, which no test changes; some modules have their own."""
    from tiny import make_data, make_model

    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model")
    make_data(root / "data")
    return root


@pytest.fixture
def memory():
    """A measured peak must not profit from buffers of the test before, nor from its garbage."""
    gc.collect()
    cache = mx.set_cache_limit(0)
    mx.clear_cache()
    yield
    mx.set_cache_limit(cache)


@pytest.fixture
def spill(tmp_path):
    """A mapped store, closed afterwards."""
    from mlx_edgelora.measure.meter import DiskMeter
    from mlx_edgelora.storage.stores import MappedStore

    store = MappedStore(tmp_path, DiskMeter())
    yield store
    store.close()


@pytest.fixture
def plain_fsync(monkeypatch):
    """Sync through os.fsync on macOS too, where a test can see it."""
    monkeypatch.delattr(files.fcntl, "F_FULLFSYNC", raising=False)
