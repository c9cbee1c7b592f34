"""How much memory a Mac has left, by what `vm_stat` prints there."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_edgelora.planner import machine

# 16 GB of an M1, macOS 14.
SONOMA = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               58231.
Pages active:                            312087.
Pages inactive:                          301422.
Pages speculative:                         9877.
Pages throttled:                              0.
Pages wired down:                        141009.
Pages purgeable:                          12044.
"Translation faults":                 412299817.
Pages copy-on-write:                   12291873.
Pages zero filled:                    201884417.
Pages reactivated:                     31170228.
Pages purged:                           4181770.
File-backed pages:                       221345.
Anonymous pages:                         402041.
Pages stored in compressor:              480013.
Pages occupied by compressor:            198841.
Decompressions:                        18833411.
Compressions:                          23554109.
Pageins:                                9180211.
Pageouts:                                 80113.
Swapins:                                 220019.
Swapouts:                                300127.
"""
# 8 GB of an M2 that is busy, macOS 15.
SEQUOIA = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                4117.
Pages active:                            141533.
Pages inactive:                          139877.
Pages speculative:                          588.
Pages throttled:                              0.
Pages wired down:                         96420.
Pages purgeable:                            301.
"Translation faults":                1720884310.
Pages copy-on-write:                   38110917.
Pages zero filled:                    911830055.
Pages reactivated:                    210049301.
Pages purged:                          11209384.
File-backed pages:                        98033.
Anonymous pages:                         183965.
Pages stored in compressor:              311240.
Pages occupied by compressor:            128030.
Decompressions:                       160283301.
Compressions:                         190012877.
Pageins:                               20118832.
Pageouts:                                901288.
Swapins:                                8801131.
Swapouts:                              10022817.
"""
# As of macOS 26, with lines that are not known yet, one of which begins like one that is.
TAHOE = SONOMA.replace(
    "Pages purgeable:", "Pages free for tags:                       7777.\nPages purgeable:"
)
EXPECTED = {
    "macOS 14": (SONOMA, 16384 * (58231 + 301422 + 9877)),
    "macOS 15": (SEQUOIA, 16384 * (4117 + 139877 + 588)),
    "macOS 26": (TAHOE, 16384 * (58231 + 301422 + 9877)),
    "Intel": (SONOMA.replace("16384", "4096"), 4096 * (58231 + 301422 + 9877)),
}


@pytest.fixture
def mac(monkeypatch):
    """A Mac of 16 GB whose `vm_stat` prints a text, or fails; gives what else it is to say."""

    def make(text, level=None):
        def run(command, timeout, **_):
            assert command == ["vm_stat"] and timeout <= 10
            if isinstance(text, Exception):
                raise text
            return SimpleNamespace(stdout=text)

        def absent(path):
            raise FileNotFoundError(str(path))

        monkeypatch.setattr(Path, "read_text", absent)  # neither /proc nor /sys
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(machine, "_physical", lambda: 16 * 2**30)
        monkeypatch.setattr(
            machine, "sysctl", lambda name: level if name == "kern.memorystatus_level" else None
        )

    return make


@pytest.mark.parametrize("system", EXPECTED)
def test_purgeable_pages_are_counted_once(mac, system):
    """They are among the active and inactive ones."""
    text, expected = EXPECTED[system]
    mac(text)
    assert machine.free_memory() == expected


def test_the_kernel_gives_no_more_than_it_says(mac):
    mac(SONOMA, level=20)
    assert machine.free_memory() == 16 * 2**30 * 20 // 100
    mac(SONOMA, level=80)
    assert machine.free_memory() == EXPECTED["macOS 14"][1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vm_stat: command not found\n",
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free: many.\n",
        FileNotFoundError("vm_stat"),
        subprocess.TimeoutExpired("vm_stat", 5),
        subprocess.CalledProcessError(1, "vm_stat"),
    ],
    ids=["nothing", "other text", "no number", "not there", "too slow", "failed"],
)
def test_without_an_answer_nothing_is_claimed(mac, text):
    mac(text, level=50)
    assert machine.free_memory() is None


def test_the_budget_leaves_a_fifth_to_others(mac, monkeypatch):
    mac(SONOMA)
    monkeypatch.setattr(machine.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        machine.mx, "device_info", lambda: {"max_recommended_working_set_size": 11 * 2**30}
    )
    size, why = machine.default_budget()
    assert size == int(0.8 * EXPECTED["macOS 14"][1])
    assert why == "80 % of what is free"
