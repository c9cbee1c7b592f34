"""What macOS tells of its memory, by a stand-in for its C library."""

import ctypes
import sys

import pytest

from mlx_edgelora.measure import meter
from mlx_edgelora.measure.meter import memory_pressure, sysctl


class Library:
    """Knows some names; values are of four bytes, as these are on macOS."""

    def __init__(self, **values):
        self._values, self.asked = {k.replace("__", "."): v for k, v in values.items()}, []

    def sysctlbyname(self, name, value, size, new, length):
        self.asked.append(name.decode())
        assert new is None and length.value == 0 and size._obj.value == 8
        if name.decode() not in self._values:
            return -1
        number = self._values[name.decode()].to_bytes(4, sys.byteorder)
        ctypes.memmove(ctypes.addressof(value._obj), number, 4)
        size._obj.value = 4
        return 0


@pytest.fixture
def mac(monkeypatch):
    def make(library):
        monkeypatch.setattr(meter.sys, "platform", "darwin")
        monkeypatch.setattr(meter.ctypes, "CDLL", lambda name: library)
        return library

    return make


def test_a_name_that_is_known_gives_a_number(mac):
    mac(Library(kern__memorystatus_level=57))
    assert sysctl("kern.memorystatus_level") == 57
    assert sysctl("kern.other") is None


def test_without_the_function_there_is_no_number(mac):
    mac(object())
    assert sysctl("kern.memorystatus_level") is None


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_other_systems_are_not_asked(monkeypatch, mac, system):
    library = mac(Library(kern__memorystatus_vm_pressure_level=4))
    monkeypatch.setattr(meter.sys, "platform", system)
    assert sysctl("kern.memorystatus_level") is memory_pressure() is None
    assert not library.asked


@pytest.mark.parametrize(
    ("level", "name"), [(0, None), (1, None), (2, "warning"), (4, "critical"), (7, None)]
)
def test_pressure_has_the_names_of_macos(mac, level, name):
    mac(Library(kern__memorystatus_vm_pressure_level=level))
    assert memory_pressure() == name


def test_pressure_that_is_not_told_is_none(mac):
    mac(Library())
    assert memory_pressure() is None
