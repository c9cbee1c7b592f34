"""Settings that MLX and macOS's graphics driver read from the environment at their first use."""

import os
import sys

# Argument of processes that must have MLX's own settings, because they measure other packages.
PLAIN = "--plain-mlx"

SETTINGS = {
    # Makes Metal's driver less eager to end long computations.
    "darwin": {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1"},
    # With CUDA, MLX frees nothing before the graph of operations that uses it has been computed,
    # and keeps to a memory limit between graphs only. With its 100 operations on large GPUs, a step
    # of a 3B model takes 9.9 GB where it takes 6.2 with these.
    "linux": {"MLX_MAX_OPS_PER_BUFFER": "8", "MLX_MAX_MB_PER_BUFFER": "25"},
}


def set_defaults() -> None:
    """Set what the user did not set."""
    for name, value in SETTINGS.get(sys.platform, {}).items():
        os.environ.setdefault(name, value)


def unset_defaults() -> None:
    """Undo `set_defaults`, before MLX's first use: for a comparison with plain MLX."""
    for name, value in SETTINGS.get(sys.platform, {}).items():
        if os.environ.get(name) == value:
            del os.environ[name]
