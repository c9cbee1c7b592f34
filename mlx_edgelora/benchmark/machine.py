"""Describe the machine and the versions, and find what makes a comparison unfair."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.planner.machine import default_budget

PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "mlx-edgelora", "numpy", "transformers", "tokenizers")
# The reference BLAS reaches 2 to 6 GFLOP/s on any number of cores, other libraries more than 15 on
# one core. The speed is measured because the library may be linked statically, without a name.
SLOW_FLOPS = 8e9
SIZE = 512
REMEDY = (
    "float32 products run at {rate:.1f} GFLOP/s here, which is the slow reference BLAS of the MLX "
    "wheel (others give 20 or more); install one and set it in front: "
    "apt-get install libopenblas0-pthread && export LD_PRELOAD=libopenblas.so.0"
)


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device() == mx.cpu


def free_memory() -> int:
    """Free bytes for all contenders together: of the machine or, if less, of a CUDA GPU."""
    on_device = mx.device_info().get("free_memory")  # reported by CUDA only
    left = default_budget()[0]
    return left if on_device is None else min(left, int(on_device))


def slow_blas() -> str | None:
    """A warning about a slow BLAS, or None; measures a product, which takes a moment."""
    if not on_cpu() or platform.system() != "Linux":
        return None
    rate = product_rate()
    return REMEDY.format(rate=rate / 1e9) if rate < SLOW_FLOPS else None


def product_rate() -> float:
    """Floating-point operations per second in a float32 product, the best of three."""
    a = mx.ones((SIZE, SIZE))
    mx.eval(a)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(a @ a.T)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def machine() -> dict[str, str | int]:
    """The hardware, system and BLAS of the machine, without its host name."""
    return {
        "processor": str(mx.device_info().get("device_name") or _processor()),
        "device": str(mx.default_device()),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "blas": Path(os.environ.get("LD_PRELOAD", "")).name or "the wheel's own",
    }


def versions() -> dict[str, str]:
    """Versions of Python and the relevant packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit of this package, with + for changes; None if it is not a git checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def kernels_differ(packed: bool, kernel: str, sliced: bool) -> str | None:
    """The reason why times cannot be compared with mlx-lm's; None if they can.

    Args:
        packed: whether the model is quantized.
        kernel: kernel of this package for packed matrices: fused, dequantize or auto.
        sliced: whether its plan computes MLPs in slices, which are unpacked with any kernel.
    """
    if not packed or not on_cpu() or (kernel == "fused" and not sliced):
        return None
    return (
        "it unpacks quantized matrices where mlx-lm multiplies with packed ones, which is much "
        "slower on a CPU, so that a ratio would be one of kernels (docs/benchmarks.md)"
    )
