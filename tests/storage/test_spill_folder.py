"""Where activations are spilled when nobody says where."""

import errno
import os
from pathlib import Path

import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage import stores
from mlx_edgelora.storage.stores import spill_folder


@pytest.fixture
def on_disk(monkeypatch):
    """Folders named `memory` are in memory, others on a disk."""
    monkeypatch.setattr(stores, "_in_memory", lambda folder: folder.name == "memory")


def test_spill_folder_passes_over_memory_and_what_cannot_be_written(tmp_path, on_disk):
    (tmp_path / "file").write_text("")
    candidates = [tmp_path / "memory", tmp_path / "file" / "below", tmp_path / "made" / "here"]
    folder, reason = spill_folder(candidates)
    assert folder == tmp_path / "made" / "here"
    assert folder.is_dir()
    assert reason == "the only local disk found"
    with pytest.raises(EdgeLoraError, match=r"spill_dir: none of .*memory, .*below is a writable"):
        spill_folder(candidates[:2])


def test_first_folder_of_a_volume_is_taken(tmp_path, on_disk):
    folder, _ = spill_folder([tmp_path / "first", tmp_path / "second"])
    assert folder == tmp_path / "first"


def other_volume(tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second volume")
    return shared


def test_fastest_volume_is_taken(tmp_path, monkeypatch):
    other = other_volume(tmp_path)
    monkeypatch.setattr(stores, "_in_memory", lambda folder: False)
    for seconds in ({tmp_path: 0.25, other: 0.5}, {tmp_path: 0.5, other: 0.25}):
        monkeypatch.setattr(stores, "_write_seconds", seconds.__getitem__)
        folder, reason = spill_folder([tmp_path, other])
        assert seconds[folder] == 0.25
        assert reason == "the fastest of 2 volumes: 8.00 MB written in 0.250 s"


def test_full_volume_is_the_last_choice(tmp_path, monkeypatch):
    other = other_volume(tmp_path)
    monkeypatch.setattr(stores, "_in_memory", lambda folder: False)
    sync = os.fsync

    def full_here(descriptor):
        if os.fstat(descriptor).st_dev == tmp_path.stat().st_dev:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_here)
    assert spill_folder([tmp_path, other])[0] == other


def test_memory_is_told_by_the_table_of_mounts(tmp_path, monkeypatch):
    table = f"disk / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\ndisk {tmp_path}/disk ext4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: table)
    kinds = {
        name: stores._in_memory(tmp_path / name)
        for name in ("", "below/deep", "disk", "disk/below", "..")
    }
    assert kinds == {"": True, "below/deep": True, "disk": False, "disk/below": False, "..": False}


def test_without_a_table_of_mounts_every_folder_is_on_a_disk(tmp_path, monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert not stores._in_memory(tmp_path)
