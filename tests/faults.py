"""Runs in which the N-th operation that changes files fails, or after which the process is dead."""

import builtins
import fcntl
import io
import os
import signal
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

# Operations of `os` that take space, or names, of a volume; removing files takes none.
OF_OS = "fsync", "replace", "rename", "mkdir", "truncate", "ftruncate", "pwrite", "posix_fallocate"
# Those are counted as well by a fault that ends the process.
REMOVALS = "unlink", "rmdir"


class Faults:
    """Counts operations on files, and makes one of them fail.

    Args:
        at: number of the operation that fails, from 1; 0 counts only.
        error: errno of the failure; None ends the process with SIGKILL before the operation.
        lasting: whether all later operations that take space fail as well, as on a full disk.

    Attributes:
        calls: the operations so far, by name.
    """

    def __init__(self, at=0, error=None, lasting=False):
        self.at, self.error, self.lasting = at, error, lasting
        self.calls = []

    def __call__(self, name):
        self.calls.append(name)
        count = len(self.calls)
        if self.at == 0 or count < self.at or (count > self.at and not self.lasting):
            return
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error, os.strerror(self.error))

    @property
    def happened(self):
        return 0 < self.at <= len(self.calls)


@contextmanager
def faulty(faults):
    """Every operation of Python on files goes through `faults` meanwhile."""
    with ExitStack() as stack:
        for owner, name, function in _replacements(faults):
            stack.enter_context(patch.object(owner, name, function))
        yield faults


def _replacements(faults):
    real_open, real_os_open = io.open, os.open

    class File(io.FileIO):
        def write(self, data):
            faults("write")
            return super().write(data)

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
        if not set(mode) & set("wax+") or _is_device(file):
            return real_open(file, mode, buffering, encoding, errors, newline, **more)
        if not isinstance(file, int):
            faults("open")
        raw = File(file, mode.replace("b", "").replace("t", ""), **more)
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_opened(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not _is_device(path):
            faults("open")
        return real_os_open(path, flags, *rest, **more)

    def counted(name, function):
        def call(*arguments, **named):
            faults(name)
            return function(*arguments, **named)

        return call

    names = OF_OS + (REMOVALS if faults.error is None else ())
    changed = [(os, name, counted(name, getattr(os, name))) for name in names if hasattr(os, name)]
    changed += [(os, "open", os_opened), (io, "open", opened), (builtins, "open", opened)]
    if hasattr(fcntl, "F_FULLFSYNC"):
        changed.append((fcntl, "fcntl", counted("fcntl", fcntl.fcntl)))
    return changed


def _is_device(file):
    if isinstance(file, int):
        return file <= 2
    return str(file).startswith(("/dev/null", "/dev/std", "/dev/tty", "/proc/"))
