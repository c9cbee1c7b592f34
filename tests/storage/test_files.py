import errno
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest

from mlx_edgelora.benchmark.shapes import default_cache
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage import files
from mlx_edgelora.storage.files import make_folder, write_atomically


def failing(code):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def write(text):
    return lambda file: file.write(text)


@pytest.fixture
def pair(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.bin"
    first.write_bytes(b"old a")
    second.write_bytes(b"old b")
    return first, second


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OLD = {"a.json": b"old a", "b.bin": b"old b"}


def test_replaces_all_files_and_leaves_no_temporary(tmp_path, pair):
    write_atomically({pair[0]: write(b"new a"), pair[1]: write(b"new b")})
    assert contents(tmp_path) == {"a.json": b"new a", "b.bin": b"new b"}


def test_new_files_get_the_users_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically({tmp_path / "c": write(b"c")})
    finally:
        os.umask(old)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("plain_fsync")
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_the_old_files(tmp_path, pair, monkeypatch, function):
    monkeypatch.setattr(files.os, function, failing(errno.EIO))
    with pytest.raises(EdgeLoraError, match=r"a\.json: cannot be written \(Input/output error\)"):
        write_atomically({pair[0]: write(b"new a"), pair[1]: write(b"new b")})
    assert contents(tmp_path) == OLD


def test_the_second_file_failing_leaves_the_first_one_old(tmp_path, pair):
    with pytest.raises(EdgeLoraError, match=r"b\.bin: .*free some space"):
        write_atomically({pair[0]: write(b"new a"), pair[1]: failing(errno.ENOSPC)})
    assert contents(tmp_path) == OLD


def test_a_writers_own_exception_comes_through(tmp_path, pair):
    def broken(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically({pair[0]: write(b"new a"), pair[1]: broken})
    assert contents(tmp_path) == OLD


@pytest.mark.usefixtures("plain_fsync")
def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path, pair, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))
        )
    write_atomically({pair[0]: write(b"new a"), pair[1]: write(b"new b")})
    assert calls == ["fsync", "fsync", "replace", "replace", "fsync"]


def test_a_write_that_the_system_really_cuts_short(tmp_path, pair):
    """A file size limit is the one full disk that a test can have without being root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EdgeLoraError, match=r"b\.bin: .*File too large.*free some space"):
            write_atomically({pair[0]: write(b"new a"), pair[1]: write(b"x" * 100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == OLD


def test_full_sync_is_used_where_the_system_has_it(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda _fd, command: commands.append(command))
    write_atomically({tmp_path / "a": write(b"a")})
    assert commands == [51]


@pytest.mark.parametrize(("code", "works"), [(errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_volume_without_full_sync_falls_back_to_fsync(tmp_path, monkeypatch, code, works):
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", failing(code))
    if works:
        write_atomically({tmp_path / "a": write(b"a")})
        assert (tmp_path / "a").read_bytes() == b"a"
    else:
        with pytest.raises(EdgeLoraError, match="Input/output error"):
            write_atomically({tmp_path / "a": write(b"a")})


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_atomically({tmp_path / "a": write(b"a")})
    assert (tmp_path / "a").read_bytes() == b"a"


@pytest.mark.parametrize(
    ("system", "variable", "expected"),
    [
        ("darwin", None, "home/Library/Caches"),
        ("linux", None, "home/.cache"),
        ("linux", "", "home/.cache"),
        ("linux", "elsewhere", "elsewhere"),
        ("darwin", "elsewhere", "elsewhere"),
    ],
)
def test_caches_are_where_the_system_has_them(tmp_path, monkeypatch, system, variable, expected):
    monkeypatch.setattr(files.sys, "platform", system)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable and str(tmp_path / variable))
    assert files.user_cache() == tmp_path / expected / "mlx_edgelora"
    assert default_cache() == files.user_cache() / "random-models"


CHILD = """
import sys
from pathlib import Path
from mlx_edgelora.storage.files import write_atomically
path, count = Path(sys.argv[1]), 0
while True:
    count += 1
    text = b"%d" % (count % 10) * 200_000
    write_atomically({path: lambda file: file.write(text)})
    if count == 3:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.011, 0.023])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "file"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
    with child:
        assert child.stdout.readline() == b"ready\n"
        try:
            child.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
    text = path.read_bytes()
    assert len(text) == 200_000
    assert text == text[:1] * 200_000


def test_make_folder_makes_parents_and_leaves_nothing_in_them(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_make_folder_where_a_file_stands(tmp_path):
    (tmp_path / "a").write_text("file")
    with pytest.raises(
        EdgeLoraError, match=r"a: cannot be written \(File exists\); check the path"
    ):
        make_folder(tmp_path / "a")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_make_folder_that_is_not_writable(tmp_path, monkeypatch, code):
    monkeypatch.setattr(files.os, "open", failing(code))
    with pytest.raises(EdgeLoraError, match=r"change its permissions or choose another folder"):
        make_folder(tmp_path)
