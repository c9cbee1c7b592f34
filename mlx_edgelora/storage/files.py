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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from mlx_edgelora.errors import EdgeLoraError

Writer = Callable[[BinaryIO], None]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)


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


def write_atomically(writers: Mapping[Path, Writer]) -> None:
    """Replace the contents of files, all of them or none.

    Args:
        writers: for every path the function that writes its bytes. Renames happen in
            this order once everything is written, so name last the file that makes
            the others count.

    Raises:
        EdgeLoraError: the disk is full, or a file cannot be written; the old files
            are as they were. Whatever else a writer raises comes through unchanged.
    """
    # The process id keeps two runs that share a folder out of each other's files.
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    path = Path()
    try:
        for path, writer in writers.items():
            with open(temporaries[path], "wb") as file:
                writer(file)
                file.flush()
                sync(file.fileno())
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


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, and make sure that files can be created in it.

    Raises:
        EdgeLoraError: it cannot be created or written to; better before the first
            step than after the hundredth.
    """
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
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
