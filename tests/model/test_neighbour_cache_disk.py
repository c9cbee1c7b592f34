"""Neighbours on disk: processes killed or in parallel, disks that are full, files too large."""

import builtins
import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from neighbour_helpers import (
    ALL,
    DIMS,
    HEAD,
    SLOT_BYTES,
    SUM_BYTES,
    VOCABULARY,
    K,
    check,
    fill,
    matrix,
    truth,
)

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.head import MatrixHead
from mlx_edgelora.losses.neighbours import nearest
from mlx_edgelora.model import neighbour_cache
from mlx_edgelora.model.neighbour_cache import HEADER, NeighbourCache

ROOT = Path(__file__).parents[2]
STATM = Path("/proc/self/statm")


# --- interrupted builds -------------------------------------------------------------------


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, computed, monkeypatch, opened):
    monkeypatch.setattr(neighbour_cache, "SLOTS_BYTES", 2 * SLOT_BYTES)
    spy = neighbour_cache.nearest

    def impatient(head, some, k):
        if 4 in some.tolist():
            raise KeyboardInterrupt
        return spy(head, some, k)

    with monkeypatch.context() as patched:
        patched.setattr(neighbour_cache, "nearest", impatient)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path, HEAD, K).build(ALL)
    assert computed == [0, 1, 2, 3]
    check(opened(tmp_path, HEAD, K, pytest.fail))
    assert computed == ALL.tolist()


SCRIPT = """
import os, signal, sys
import mlx.core as mx, numpy as np
from pathlib import Path
from mlx_edgelora.losses.head import MatrixHead
from mlx_edgelora.model import neighbour_cache
from mlx_edgelora.model.neighbour_cache import NeighbourCache

neighbour_cache.QUERIES = 5
vocabulary, dims, k = map(int, sys.argv[2:5])
head = MatrixHead(mx.random.normal((vocabulary, dims), key=mx.random.key(0)))
cache = NeighbourCache(Path(sys.argv[1]), head, k, print)
write, left = os.pwrite, int(sys.argv[5])

def last_write(file, data, at):
    global left
    left -= 1
    if left == 0:
        write(file, data[: len(data) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data, at)

os.pwrite = last_write
print("ready", flush=True)
sys.stdin.readline()
cache.build(np.arange(vocabulary))
cache.row_sum()
"""


def begin(folder, *numbers):
    """A process that opens a cache, waits for a line and builds it."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *map(str, numbers)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_in_the_middle_of_a_slot(tmp_path, opened, computed):
    process = begin(tmp_path, VOCABULARY, DIMS, K, 4)
    output, _ = process.communicate("\n", timeout=60)
    assert (process.returncode, output) == (-signal.SIGKILL, "ready\n")
    cache = opened(tmp_path, HEAD, K, pytest.fail)
    assert cache.missing(ALL).tolist() == [3, 4, 5, 6]
    check(cache)
    assert computed == [3, 4, 5, 6]


def test_two_processes_may_build_one_cache_at_once(tmp_path, opened, computed):
    processes = [begin(tmp_path, 400, 8, 20, 0) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "")
    head = MatrixHead(matrix(vocabulary=400, dims=8))
    cache = opened(tmp_path, head, 20, pytest.fail)
    # In the same groups: what is equally near changes places with the rounding of a product.
    groups = [nearest(head, mx.arange(start, start + 5), 20) for start in range(0, 400, 5)]
    assert np.array_equal(cache(np.arange(400)), np.array(mx.concatenate(groups)))
    assert np.array_equal(np.array(cache.row_sum().weight), truth(head, 20)[1])
    assert computed == []
    assert list(tmp_path.iterdir()) == [cache.path]


def test_two_caches_on_one_file(tmp_path, opened, computed):
    first, second = opened(tmp_path, HEAD, K), opened(tmp_path, HEAD, K, pytest.fail)
    first.build(ALL[:4])
    second.build(ALL[2:])
    assert computed == ALL.tolist()  # what the other one has written is seen
    check(first)
    check(second)


def test_a_file_replaced_under_a_run_serves_it_to_the_end(tmp_path, opened):
    first = opened(tmp_path, HEAD, K)
    first.build(ALL[:3])
    first.path.unlink()
    second = opened(tmp_path, HEAD, K)
    check(first)
    check(second)


# --- disks and folders --------------------------------------------------------------------


def test_slots_never_written_take_no_space(tmp_path, opened):
    head = MatrixHead(matrix(vocabulary=20_000, dims=2))
    cache = opened(tmp_path, head, 1000)
    cache.build(np.array([0, 10_000, 19_999]))
    found = cache.path.stat()
    assert found.st_size > 80_000_000
    assert 512 * found.st_blocks < 200_000


def test_a_vocabulary_and_k_as_large_as_they_come(tmp_path, opened, monkeypatch):
    """2.4 GB if it were not sparse; places beyond 2**31 bytes."""
    head = MatrixHead(matrix(vocabulary=152_064, dims=2))
    tokens = np.array([0, 152_063, 100_000])
    rows = (tokens[:, None] + 7 * np.arange(4000)) % 152_064
    near = {token: row for token, row in zip(tokens.tolist(), rows, strict=True)}
    monkeypatch.setattr(
        neighbour_cache,
        "nearest",
        lambda head, some, k: mx.array(np.stack([near[t] for t in some.tolist()]), mx.int32),
    )
    cache = opened(tmp_path, head, 4000)
    assert np.array_equal(cache(tokens), rows)
    assert cache.path.stat().st_size > 2**31
    assert 512 * cache.path.stat().st_blocks < 200_000


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="CUDA maps libraries at their first use")
@pytest.mark.skipif(not STATM.exists(), reason="asks Linux how much of the process is files'")
def test_pages_of_the_file_do_not_stay_with_the_process(tmp_path, opened, monkeypatch):
    """12 MB of slots are looked at, twice."""

    def near(head, some, k):
        return (some[:, None] + mx.arange(k)).astype(mx.int32) % 3000

    monkeypatch.setattr(neighbour_cache, "nearest", near)
    cache = opened(tmp_path, MatrixHead(matrix(vocabulary=3000, dims=2)), 1000)
    before = mapped_pages()
    cache.build(np.arange(3000))
    assert cache.missing(np.arange(3000)).size == 0
    assert cache(np.arange(3000)).shape == (3000, 1000)
    assert (mapped_pages() - before) * resource.getpagesize() < 2_000_000


def mapped_pages():
    return int(STATM.read_text().split()[2])


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("moment", ["replace", "pwrite", "open"])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patched:
        if moment == "open":
            patched.setattr(builtins, "open", failing(errno.ENOSPC))
        else:
            patched.setattr(os, moment, failing(errno.ENOSPC))
        with pytest.raises(EdgeLoraError, match=FULL):
            fill(tmp_path)
    assert not list(tmp_path.glob(".*"))
    with closing(NeighbourCache(tmp_path, HEAD, K)) as cache:
        check(cache)


FULL = r"neighbours-.*bin: cannot be written \(No space left on device\); free some.*--cache-dir"


def test_a_disk_that_fills_up_in_the_middle_of_a_slot(tmp_path, opened, computed):
    """The system writes what it has room for and says so, without an error."""
    cache = opened(tmp_path, HEAD, K)
    limit = HEADER.size + SUM_BYTES + 3 * SLOT_BYTES + 5
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(EdgeLoraError, match=r"cannot be written \(File too large\); free"):
            cache.build(ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.missing(ALL).tolist() == [3, 4, 5, 6]
    check(cache)


@pytest.mark.parametrize("at_a_time", [1, 5])
def test_what_is_written_in_pieces_arrives(tmp_path, opened, monkeypatch, at_a_time):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:at_a_time], at))
    check(opened(tmp_path, HEAD, K))


@pytest.mark.parametrize("where", ["folder", "file"])
def test_what_cannot_be_written_is_named(tmp_path, where):
    if where == "folder":
        (tmp_path / "cache").write_text("in the way")
    else:
        path = fill(tmp_path / "cache")
        path.unlink()
        path.mkdir()
    with pytest.raises(EdgeLoraError, match=rf"^{tmp_path}/cache/neighbours-.*cannot be written"):
        NeighbourCache(tmp_path / "cache", HEAD, K)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_may_only_be_read_is_named(tmp_path, monkeypatch, where):
    """Said by the system, since a test that runs as root may write anything."""
    if where == "file":
        fill(tmp_path)
        real = builtins.open

        def read_only(path, how="r", *rest, **more):
            return failing(errno.EACCES)() if how == "r+b" else real(path, how, *rest, **more)

        monkeypatch.setattr(builtins, "open", read_only)
    else:
        monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(EdgeLoraError, match=r"cannot be written \(Permission denied\).*cache-dir"):
        NeighbourCache(tmp_path, HEAD, K)
