"""Keep a Mac awake during a run."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def keep_awake(enabled: bool) -> Iterator[None]:
    """Prevent idle sleep on macOS; the display may sleep. Never fails.

    A Mac on battery power still sleeps when its lid is closed.
    """
    if not enabled or sys.platform != "darwin":
        yield
        return
    # With `-w`, caffeinate exits when this process does, even after a crash.
    command = ["caffeinate", "-i", "-w", str(os.getpid())]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        process = subprocess.Popen(command, **quiet)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        process.terminate()
        process.wait()
