"""Temporary files and folders that are recognized when the process that made them is dead.

A name is drawn at random and opened only if nothing has it yet, so that no other process can have
it, whatever container it runs in, and no link is followed. The process holds the system's lock
(flock) on the file or folder, which ends with the process. A temporary whose lock is free is
therefore a left-over.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Errors of volumes that have no locks, such as some network volumes.
NO_LOCKS = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.ENOLCK, errno.EBADF)
# `.adapters.safetensors.0123456789abcdef.tmp`
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_MINE = "mlx_edgelora"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else has; `remove_left_overs` knows it again."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def create(path: Path, like: Path | None = None, mode: int = 0o666) -> BinaryIO:
    """Open a new file for writing; it is locked until it is closed.

    Args:
        path: the new file; if it is a name of `temporary_name`, keep it open until it is renamed.
        like: a file whose permissions it gets, if there is one.
        mode: its permissions otherwise, less those that the process's umask takes away.

    Raises:
        OSError: the name is taken, by a link as well, or the folder takes no file.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            _lock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # not taken for a left-over before it was locked
                if like is not None:
                    with contextlib.suppress(OSError):
                        os.fchmod(descriptor, stat.S_IMODE(os.stat(like).st_mode))
                return os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def create_unnamed(folder: str | os.PathLike) -> BinaryIO:
    """Open a new file for reading and writing, unbuffered, that only its owner can read.

    It loses its name at once, so that a crash leaves nothing.

    Raises:
        OSError: the folder takes no file.
    """
    with scratch_file(Path(folder)) as (file, _):
        return file


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file as of `create_unnamed` that has its name inside this context, and is open after it.

    Yields:
        The file and its path.

    Raises:
        OSError: the folder takes no file.
    """
    path = temporary_name(folder / _MINE)
    with create(path, mode=0o600) as file:
        try:
            yield os.fdopen(os.dup(file.fileno()), "w+b", buffering=0), path
        finally:
            path.unlink()


@contextlib.contextmanager
def temporary_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder beside `path`, locked; it is removed afterwards unless it was renamed.

    Raises:
        OSError: it cannot be created.
    """
    folder = temporary_name(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode)
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        _lock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder that only its owner can read, removed afterwards.

    Raises:
        OSError: it cannot be created.
    """
    with temporary_folder(parent / _MINE, 0o700) as folder:
        yield folder


def left_overs(folder: Path, name: str | None = None) -> list[Path]:
    """Temporary files and folders in `folder` whose process is dead.

    Args:
        folder: a folder that may be missing.
        name: only temporaries of this file's name; None for all.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    found = ((path, _TEMPORARY.fullmatch(path.name)) for path in entries)
    ours = [path for path, match in found if match and name in (None, match[1])]
    return [path for path in ours if not is_used(path)]


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove the `left_overs` of a folder, as far as that is possible."""
    for path in left_overs(folder, name):
        remove(path)


def remove_scratch(folder: Path) -> None:
    """Remove the `left_over_scratch` of a folder, as far as that is possible."""
    remove_left_overs(folder, _MINE)


def left_over_scratch(folder: Path) -> list[Path]:
    """The `left_overs` of this package in a folder where other programs have files too."""
    return left_overs(folder, _MINE)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def is_used(path: Path) -> bool:
    """Whether a file or folder is locked by a living process, or cannot be checked."""
    try:
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return True
        access = os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR
        descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def mark_used(path: Path) -> int:
    """Show other processes that this one uses a file or folder, until the descriptor is closed.

    Returns:
        The open descriptor.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _lock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
