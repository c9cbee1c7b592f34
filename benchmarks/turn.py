"""Import everything, wait for a file, and run a script or a module. Used by `gpu.sh`.

    python turn.py FILE SCRIPT ARGUMENTS...
    python turn.py FILE -m MODULE ARGUMENTS...

Importing MLX's CUDA build takes 15 s on a fresh machine, so all processes are started at once and
compute one after the other. The file says how many seconds this one has; where it was is printed
if they do not suffice. Each line of its output begins with the seconds since its turn.
"""

import faulthandler
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO


class Timed:
    """A text stream whose lines begin with the seconds since this was made."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._began, self._at_start = stream, time.monotonic(), True

    def write(self, text: str) -> int:
        """See `TextIO`."""
        for line in text.splitlines(keepends=True):
            if self._at_start:
                self._stream.write(f"{time.monotonic() - self._began:6.2f}  ")
            self._stream.write(line)
            self._at_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


go, sys.argv = Path(sys.argv[1]), sys.argv[2:]
name = go.name

from mlx_edgelora.mlx_settings import PLAIN, unset_defaults  # noqa: E402

if PLAIN in sys.argv:
    unset_defaults()

import mlx.core as mx  # noqa: E402

import mlx_edgelora.benchmark.contenders  # noqa: E402, F401

mx.eval(mx.zeros(8) + 1)
print(f"{name}: ready on {mx.default_device()}", flush=True)
until = time.monotonic() + 590
while not (go.exists() and go.read_text()):
    time.sleep(0.05)
    if time.monotonic() > until:
        sys.exit(f"{name}: was not told to go")
sys.stdout = Timed(sys.stdout)
seconds = int(go.read_text())
faulthandler.dump_traceback_later(seconds - 1)
signal.alarm(seconds)
began = time.monotonic()
try:
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
