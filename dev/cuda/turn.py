"""Import everything, wait for /tmp/go-NAME, and run a script or a module within LIMIT seconds.

    LIMIT=60 python turn.py NAME SCRIPT ARGUMENTS...
    LIMIT=60 python turn.py NAME -m MODULE ARGUMENTS...

Importing MLX's CUDA build takes 15 s on a fresh machine, so all processes are started at once and
compute one after the other. With NVRTC_STUB, whose results have no meaning, no check fails.
"""

import math
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

name, sys.argv = sys.argv[1], sys.argv[2:]
STUB = "NVRTC_STUB" in os.environ
if STUB:
    math.isfinite = lambda x: True
    np.array_equal = lambda *args, **options: True
    np.isfinite = lambda x: np.ones(np.shape(x), bool)

from mlx_edgelora.mlx_settings import PLAIN, unset_defaults  # noqa: E402

if PLAIN in sys.argv:
    unset_defaults()

import mlx.core as mx  # noqa: E402

import mlx_edgelora.benchmark.contenders  # noqa: E402, F401


def agrees(check: Callable) -> Callable:
    """The check, whose kernels are asked for, but which is always passed."""

    def agree(*args: object, **options: object) -> mx.array:
        mx.eval(check(*args, **options))
        return mx.array(True)

    return agree


if STUB:
    import mlx_edgelora.model.head as head

    mx.array_equal, mx.allclose = agrees(mx.array_equal), agrees(mx.allclose)
    head.check_rows = lambda *args, **options: None

mx.eval(mx.zeros(8) + 1)
print(f"{name}: ready on {mx.default_device()}", flush=True)
until = time.monotonic() + 500
while not Path(f"/tmp/go-{name}").exists():
    time.sleep(0.05)
    if time.monotonic() > until:
        sys.exit(f"{name}: was not told to go")
signal.alarm(int(os.environ.get("LIMIT", "600")))
began = time.monotonic()
try:
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
