"""Replacing files so that a crash, a full disk or a power cut never damages a good one.

Every file is written whole under a temporary name in its own folder and synced to
the medium before any of them takes its final name, so a set of files either keeps its
old state or takes its new one, up to the instant between two renames.
"""

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.temporaries import (
    NO_LOCKS,
    create,
    create_unnamed,
    remove_left_overs,
    remove_scratch,
    temporary_name,
)

Writer = Callable[[BinaryIO], None]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)
LOCK_FILE = ".lock"
# What reading a damaged JSON file of a cache may raise.
CACHE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
# Seconds to wait for another process that changes a cache, which takes milliseconds.
PATIENCE = 2.0


def user_cache() -> Path:
    """The folder of files that are kept between runs: converted models, measurements."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(base) / "mlx_edgelora"


class WatchedFiles:
    """Files that are read several times and must not change in between.

    A run reads a model for hours. If a file were replaced in that time, the run would silently mix
    the weights of two models.
    """

    def __init__(self) -> None:
        self._stamps: dict[Path, tuple[int, int, int]] = {}

    def watch(self, path: Path) -> None:
        """Remember a file as it is now, before it is read for the first time."""
        self._stamps[path] = _stamp(path)

    def check(self, *paths: Path) -> None:
        """Check that these files, or all watched ones, are unchanged.

        Raises:
            EdgeLoraError: a file is missing or has changed.
        """
        for path in paths or self._stamps:
            if _stamp(path) != self._stamps[path]:
                raise EdgeLoraError(
                    f"{path}: the file changed during the run, expected it as it was at the "
                    "start; leave the model's files unchanged and start again"
                )


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise EdgeLoraError(
            f"{path}: cannot be read ({error.strerror}); put the file back and start again"
        ) from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def write_atomically(writers: Mapping[Path, Writer], outdated: Path | None = None) -> None:
    """Replace the contents of files, all of them or none.

    Args:
        writers: for every path the function that writes its bytes. Renames happen in
            this order once everything is written, so name last the file that makes
            the others count.
        outdated: a file that is removed before the first rename.

    Raises:
        EdgeLoraError: the disk is full, or a file cannot be written; the old files
            are as they were. Whatever else a writer raises comes through unchanged.
    """
    temporaries = {path: temporary_name(path) for path in writers}
    path = Path()
    try:
        with contextlib.ExitStack() as stack:  # open, and thereby locked, until they are renamed
            for path, writer in writers.items():
                remove_left_overs(path.parent, path.name)
                file = stack.enter_context(create(temporaries[path], like=path))
                writer(file)
                file.flush()
                sync(file.fileno())
            if outdated is not None:
                outdated.unlink(missing_ok=True)
            for path in writers:
                os.replace(temporaries[path], path)
        for folder in {path.parent for path in writers}:
            sync_folder(folder)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, option: str = "--adapter-path") -> Iterator[None]:
    """Keep other runs out of a folder. The system lifts the lock when the process ends.

    Raises:
        EdgeLoraError: another process has the lock, or the folder cannot be written.
    """
    try:
        descriptor = _lock(folder / LOCK_FILE)
    except BlockingIOError as error:
        raise EdgeLoraError(
            f"{folder}: another run is writing to this folder; wait for its end, or choose "
            f"another folder with {option}"
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        _unlock(folder / LOCK_FILE, descriptor)


@contextlib.contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the small files of a cache meanwhile.

    Waits `PATIENCE` seconds for another process at most, and then goes on: what a process loses of
    such a file is measured again.

    Raises:
        OSError: the folder cannot be written.
    """
    end, descriptor = time.monotonic() + PATIENCE, -1
    while descriptor < 0 and time.monotonic() < end:
        try:
            descriptor = _lock(folder / LOCK_FILE)
        except BlockingIOError:
            time.sleep(0.01)
    try:
        yield
    finally:
        _unlock(folder / LOCK_FILE, descriptor)


def _lock(path: Path) -> int:
    """Create and lock a file; returns its descriptor.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file cannot be created.
    """
    descriptor = -1
    try:
        while not _is_same(path, descriptor):  # the owner of the lock removes the file
            if descriptor >= 0:
                os.close(descriptor)
                descriptor = -1
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return descriptor


def _unlock(path: Path, descriptor: int) -> None:
    if descriptor < 0:
        return
    with contextlib.suppress(OSError):
        if _is_same(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_same(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of its name."""
    if descriptor < 0:
        return False
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, and make sure that files can be created in it.

    Raises:
        EdgeLoraError: it cannot be created or written to; better before the first
            step than after the hundredth.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_scratch(folder)
        create_unnamed(folder).close()
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> EdgeLoraError:
    """The sentence for a write to `path` that failed with `error`."""
    if error.errno in _NO_SPACE:
        advice = "free some space or choose a folder on another volume"
    elif error.errno in _NO_PERMISSION:
        advice = "change its permissions or choose another folder"
    else:
        advice = "check the path or choose another folder"
    reason = error.strerror or type(error).__name__
    return EdgeLoraError(f"{path}: cannot be written ({reason}); {advice}")


def error_line(error: Exception) -> str:
    """The text of an error of a damaged cache, in a few words."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join(str(text).split())[:100] or type(error).__name__


def sync(descriptor: int) -> None:
    """Wait until what was written to a file is on the medium."""
    # On macOS fsync stops at the drive's cache; only F_FULLFSYNC reaches the medium,
    # and network volumes refuse it.
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(descriptor, full_sync)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the medium."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network volumes cannot sync a folder; the renames are still done.
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
