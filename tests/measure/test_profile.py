"""The memory profile: peaks by phase, nothing lost of the whole peak, nothing without recording."""

import io
import json

import mlx.core as mx
import pytest

from mlx_edgelora.measure import profile
from mlx_edgelora.measure.meter import peak_memory, reset_peak

MIB = 2**20


def hold(mib):
    array = mx.zeros((mib * MIB // 4,))
    mx.eval(array)
    return array


def test_peaks_belong_to_the_innermost_phase(memory):
    base = mx.get_active_memory()
    reset_peak()
    with profile.recording() as found:
        profile.begin_step()
        with profile.phase("recompute", 3):
            hold(2)
            with profile.phase("backward"):
                hold(8)
            hold(1)
        with profile.phase("update"):
            hold(4)
    names = [(s.phase, s.block) for s in found.entries]
    expected = [("recompute", 3), ("backward", 3), ("recompute", 3), ("update", None)]
    assert names == expected
    peaks = [round((s.peak_bytes - base) / MIB) for s in found.entries]
    assert peaks == [2, 8, 1, 4]
    assert found.peak().phase == "backward"
    assert found.by_phase()["recompute"].peak_bytes - base >= 2 * MIB
    assert "backward" in found.table().splitlines()[2]
    assert "<- the peak of the step" in found.table()
    assert len(json.loads(found.json())) == 4
    # Starting anew at every phase loses nothing of the whole.
    assert round((peak_memory() - base) / MIB) == 8


def test_a_step_forgets_the_one_before(memory):
    with profile.recording() as found:
        for _ in range(2):
            profile.begin_step()
            with profile.phase("head"):
                hold(1)
    assert len(found.entries) == 1


def test_phases_cost_nothing_without_recording(memory):
    reset_peak()
    hold(4)
    before = mx.get_peak_memory()
    with profile.phase("forward", 0):
        assert mx.get_peak_memory() == before


def test_the_plot_is_a_picture(memory):
    pytest.importorskip("matplotlib")
    with profile.recording() as found, profile.phase("head"):
        hold(1)
    file = io.BytesIO()
    found.plot(file)
    assert file.getvalue().startswith(b"\x89PNG")
