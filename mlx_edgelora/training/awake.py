"""A Mac that does not fall asleep in the middle of a run."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def keep_awake(enabled: bool) -> Iterator[None]:
    """On macOS, keep the system from idle sleep; the display may sleep. Never fails.

    A closed lid on battery power sends a Mac to sleep all the same.
    """
    if not enabled or sys.platform != "darwin":
        yield
        return
    # It ends with this process, however that ends.
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
