"""How fast a machine is: what its rates are kept for, and how long."""

import subprocess
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_edgelora.planner import machine
from mlx_edgelora.planner.machine import Rates, converts_dtype, measure_rates, this_machine

SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 lowpowermode         0
 displaysleep         10
"""


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """keys() -> of how many machines rates were measured so far, and the key of this one."""
    calls = []
    rates = Rates(*map(float, range(1, 8)))
    monkeypatch.setattr(machine, "measure_rates", lambda *_: calls.append(1) or rates)

    def ask():
        here = this_machine(tmp_path, tmp_path, mx.float32)
        assert here.rates == rates
        return len(calls), here.key

    return ask


@pytest.fixture
def mac(monkeypatch):
    """A Mac whose version and answer to `pmset -g` can be set."""
    state = SimpleNamespace(version="15.1", answer=SETTINGS)

    def run(command, timeout, **_):
        assert command == ["pmset", "-g"] and timeout <= 5
        if isinstance(state.answer, Exception):
            raise state.answer
        return SimpleNamespace(stdout=state.answer)

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: (state.version, ("", "", ""), ""))
    monkeypatch.setattr(machine.subprocess, "run", run)
    return state


def test_another_macos_or_power_mode_is_another_machine(mac, keys):
    assert keys()[0] == keys()[0] == 1
    assert keys()[1].endswith(" macOS 15.1 lowpowermode 0")
    mac.answer = SETTINGS.replace("displaysleep         10", "displaysleep         2")
    assert keys()[0] == 1
    mac.answer = SETTINGS.replace("lowpowermode         0", "lowpowermode         1")
    assert keys()[0] == 2
    mac.answer = SETTINGS.replace("lowpowermode         0", "powermode            2")
    assert keys()[0] == 3
    mac.version = "15.2"
    assert keys()[0] == 4


@pytest.mark.parametrize(
    "answer",
    [
        FileNotFoundError("pmset"),
        subprocess.TimeoutExpired("pmset", 2),
        subprocess.CalledProcessError(1, "pmset"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "no text"),
        "",
        "powermode",
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_a_power_mode_that_cannot_be_told_is_no_failure(mac, keys, answer):
    mac.answer = answer
    assert " macOS 15.1" in keys()[1]
    assert keys()[0] == 1


def test_elsewhere_nobody_is_asked(mac, keys, monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    mac.answer = AssertionError("asked")
    assert "macOS" not in keys()[1]


@pytest.mark.parametrize(("days", "again"), [(29.9, False), (30.1, True), (-1, True)])
def test_rates_are_measured_anew_after_a_month(keys, monkeypatch, days, again):
    """And where the clock says that they are of the future."""
    now = 1.7e9
    monkeypatch.setattr(machine.time, "time", lambda: now)
    assert keys()[0] == keys()[0] == 1
    now += days * 24 * 3600
    assert keys()[0] == 1 + again
    assert keys()[0] == 1 + again


@pytest.mark.parametrize(
    "text", ["{]", "[]", '{"a": 1}', '{"a": {"rates": {}, "measured": 1}}', '{"a": {"flops": 1}}']
)
def test_a_damaged_file_is_measured_again(keys, tmp_path, text):
    (tmp_path / "machine.json").write_text(text)
    assert keys()[0] == keys()[0] == 1


@pytest.mark.parametrize(("device", "warm"), [(mx.gpu, True), (mx.cpu, False)])
def test_a_gpu_is_warmed_up_before_it_is_timed(monkeypatch, tmp_path, device, warm):
    clock, timed = [0.0], []

    def tick():
        clock[0] += 0.01
        return clock[0]

    def seconds(function, times=1, rounds=3):
        timed.append(clock[0])
        return 1.0

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(machine, "COLUMNS", 64)
    monkeypatch.setattr(machine, "_disk", lambda folder: (1.0, 1.0))
    monkeypatch.setattr(machine.time, "perf_counter", tick)
    monkeypatch.setattr(machine, "_seconds", seconds)
    measure_rates(tmp_path, mx.float32)
    assert (timed[0] >= 0.2) == warm


@pytest.mark.parametrize(
    ("device", "spent", "expected"),
    [
        (mx.gpu, [3.0, 0.05, 0.1, 0.1], 0.05),  # the first one may compile for a minute
        (mx.gpu, [0.01, 3.0], 3.0),
        (mx.cpu, [3.0, 0.05, 0.1, 0.1], 0.05),  # the system did something else
        (mx.cpu, [3.0, 2.0], 2.0),  # it is that slow
        (mx.cpu, [0.01, 3.0], 0.01),
    ],
)
def test_neither_compiling_nor_a_stall_is_a_rate(monkeypatch, device, spent, expected):
    times = iter([10.0 * n + end for n, own in enumerate(spent) for end in (0.0, own)])
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx, "eval", lambda arrays: None)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    assert machine._seconds(lambda: None) == pytest.approx(expected)
    assert next(times, None) is None


@pytest.mark.parametrize(
    ("architecture", "dtype", "expected"),
    [
        ("applegpu_g13g", mx.bfloat16, True),
        ("applegpu_g13s", mx.bfloat16, True),
        ("applegpu_g14d", mx.bfloat16, True),
        ("applegpu_g14s", mx.float16, False),
        ("applegpu_g15s", mx.bfloat16, False),
        ("applegpu_g17g", mx.bfloat16, False),
        ("sm_90", mx.bfloat16, False),
        (None, mx.bfloat16, False),
    ],
)
def test_which_gpus_convert_bfloat16(monkeypatch, architecture, dtype, expected):
    info = {} if architecture is None else {"architecture": architecture}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert converts_dtype(dtype) is expected
