import ctypes
import os
import resource
import threading

import mlx.core as mx
import numpy as np
import pytest
from backends import frees_at_once

from mlx_edgelora.measure import meter
from mlx_edgelora.measure.meter import DiskMeter, footprint, peak_memory, recent_peak, reset_peak
from mlx_edgelora.measure.profile import phase, recording


def test_footprint_follows_memory_that_is_touched():
    before = footprint()
    block = np.ones(64 << 20, np.uint8)
    grown = footprint() - before
    assert 60 << 20 <= grown <= 80 << 20
    del block
    assert footprint() - before < 16 << 20


def test_footprint_asks_the_macos_call_where_it_exists(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def proc_pid_rusage(pid, flavor, buffer):
            asked.append((pid, flavor, ctypes.sizeof(buffer._obj)))
            # rusage_info_v0: ri_uuid[16], then ri_phys_footprint as the eighth counter.
            ctypes.memmove(ctypes.addressof(buffer._obj) + 16 + 7 * 8, b"\x39\x30" + b"\0" * 6, 8)
            return 0

    monkeypatch.setattr(meter.ctypes, "CDLL", lambda _name: Library)
    assert footprint() == 12345
    assert asked == [(os.getpid(), 0, 16 + 10 * 8)]


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_footprint_without_either_is_the_largest_resident_set(monkeypatch, platform, unit):
    monkeypatch.setattr(meter, "_phys_footprint", lambda: None)
    monkeypatch.setattr(meter, "_resident_set", lambda: None)
    monkeypatch.setattr(meter.sys, "platform", platform)
    assert footprint() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_peak_memory_starts_anew_after_reset():
    mx.eval(mx.zeros((1 << 20,)))
    assert peak_memory() >= 4 << 20
    mx.clear_cache()
    reset_peak()
    assert peak_memory() < 4 << 20


@frees_at_once
def test_the_recent_peak_begins_anew_and_the_whole_one_goes_on():
    reset_peak()
    mx.eval(mx.zeros((1 << 20,)))
    with recording(), phase("head"):  # which takes laps of its own
        mx.eval(mx.zeros((1 << 10,)))
    assert recent_peak() >= 4 << 20
    mx.clear_cache()
    mx.eval(mx.zeros((1 << 10,)))
    assert recent_peak() < 4 << 20 <= peak_memory()


def test_disk_meter_counts_from_many_threads():
    disk = DiskMeter()

    def count():
        for _ in range(5000):
            disk.add_read(3)
            disk.add_written(2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (disk.read_bytes, disk.written_bytes) == (60_000, 40_000)
    assert disk.snapshot() == meter.DiskCounts(60_000, 40_000)


@pytest.mark.parametrize(("device", "limits"), [(mx.cpu, [1, 1 << 40]), (mx.gpu, [])])
def test_the_limit_of_one_evaluation_is_a_cpu_s(monkeypatch, device, limits):
    """A GPU would empty its cache of freed buffers for it."""
    found, x = [], mx.zeros((3,)) + 1
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: found.append(size) or 1 << 40)
    meter.eval_without_run_ahead(x)
    assert found == limits and x.tolist() == [1, 1, 1]
