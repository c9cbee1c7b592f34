"""Temporaries: who has one is known by its lock, whatever its name."""

import os
import stat
import subprocess
import sys

import pytest

from mlx_edgelora.storage import temporaries
from mlx_edgelora.storage.files import locked, make_folder, updating, write_atomically
from mlx_edgelora.storage.temporaries import (
    create,
    create_unnamed,
    is_used,
    left_overs,
    mark_used,
    remove_left_overs,
    scratch_folder,
    temporary_folder,
    temporary_name,
)

CHILD = """
import os, signal, sys
from pathlib import Path
from mlx_edgelora.storage.temporaries import create, temporary_folder, temporary_name
folder = Path(sys.argv[1])
file = create(temporary_name(folder / "file"))
with temporary_folder(folder / "folder") as inside:
    (inside / "part").write_bytes(b"part")
    print("ready", flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def child(tmp_path):
    """A process that holds a temporary file and folder until it is killed."""
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_temporaries_of_a_living_process_stay_and_of_a_dead_one_go(tmp_path, child):
    held = sorted(tmp_path.iterdir())
    assert len(held) == 2
    assert left_overs(tmp_path) == []
    remove_left_overs(tmp_path)
    assert sorted(tmp_path.iterdir()) == held
    child.stdin.write(b"x")
    child.stdin.flush()
    child.wait()
    assert left_overs(tmp_path) == held
    remove_left_overs(tmp_path, "file")
    assert list(tmp_path.iterdir()) == [path for path in held if ".folder." in path.name]
    remove_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_names_links_and_fifos_stay(tmp_path):
    (tmp_path / "kept").write_text("")
    names = ["file.0123456789abcdef.tmp", ".file.0123456789abcde.tmp", ".file.tmp"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / ".link.0123456789abcdef.tmp").symlink_to(tmp_path / "kept")
    os.mkfifo(tmp_path / ".fifo.0123456789abcdef.tmp")
    before = sorted(tmp_path.iterdir())
    remove_left_overs(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Even if somebody guesses the name."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    monkeypatch.setattr(temporaries.secrets, "token_hex", lambda count: "0" * 16)
    temporary_name(tmp_path / "file").symlink_to(victim)
    with pytest.raises(FileExistsError):
        create(temporary_name(tmp_path / "file"))
    with pytest.raises(FileExistsError), temporary_folder(tmp_path / "file"):
        pass
    assert victim.read_text() == "untouched"


def test_what_a_write_left_is_removed_by_the_next_one(tmp_path):
    left = temporary_name(tmp_path / "plan.json")
    other = temporary_name(tmp_path / "log.json")
    left.write_text("half")
    other.write_text("half")
    write_atomically({tmp_path / "plan.json": lambda file: file.write(b"whole")})
    assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "plan.json"])


def test_a_file_taken_for_a_left_over_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    path, calls = temporary_name(tmp_path / "file"), []
    real = temporaries.fcntl.flock

    def slow(descriptor, kind):
        calls.append(kind)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, kind)

    monkeypatch.setattr(temporaries.fcntl, "flock", slow)
    with create(path) as file:
        file.write(b"here")
    assert path.read_bytes() == b"here" and len(calls) == 2


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_permissions_are_kept(tmp_path, mode):
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(mode)
    write_atomically({file: lambda target: target.write(b"new")})
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_scratch_is_private_and_leaves_nothing(tmp_path):
    with create_unnamed(tmp_path) as file:
        assert list(tmp_path.iterdir()) == []
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        file.write(b"abc")
        file.seek(0)
        assert file.read() == b"abc"
    with scratch_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert is_used(folder) and left_overs(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_was_killed_is_removed(tmp_path):
    temporary_name(tmp_path / "mlx_edgelora").write_text("")
    kept = temporary_name(tmp_path / "file")
    kept.write_text("")
    make_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_what_is_marked_is_used_until_it_is_closed(tmp_path):
    one, two = mark_used(tmp_path), mark_used(tmp_path)
    os.close(one)
    assert is_used(tmp_path)
    os.close(two)
    assert not is_used(tmp_path)


def test_an_update_waits_for_another_one_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_edgelora.storage.files.PATIENCE", 0.05)
    reached = []
    with locked(tmp_path), updating(tmp_path):
        reached.append("without the lock")
    with updating(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert reached and list(tmp_path.iterdir()) == []
