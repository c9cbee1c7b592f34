"""Where and with what figures were made, and what stands in the way of fair ones."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.planner.machine import default_budget

PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "mlx-edgelora", "numpy", "transformers", "tokenizers")
# The reference BLAS multiplies at 2 to 6 GFLOP/s whatever the number of cores, any other at more
# than 15 on one of them. Speed is looked at, not the library's name: it may be linked in.
SLOW_FLOPS = 8e9
SIZE = 512
REMEDY = (
    "float32 products run at {rate:.1f} GFLOP/s here, which is the slow reference BLAS of the MLX "
    "wheel (others give 20 or more); install one and set it in front: "
    "apt-get install libopenblas0-pthread && export LD_PRELOAD=libopenblas.so.0"
)


def on_cpu() -> bool:
    """Whether MLX computes on a CPU here."""
    return mx.default_device() == mx.cpu


def free_memory() -> int:
    """Bytes that contenders may take together: the machine's, and those of a GPU of its own."""
    on_device = mx.device_info().get("free_memory")  # CUDA's alone
    left = default_budget()[0]
    return left if on_device is None else min(left, int(on_device))


def slow_blas() -> str | None:
    """The sentence about a slow BLAS, where there is one; takes a moment."""
    if not on_cpu() or platform.system() != "Linux":
        return None
    rate = product_rate()
    return REMEDY.format(rate=rate / 1e9) if rate < SLOW_FLOPS else None


def product_rate() -> float:
    """Floating-point operations a second in a linear layer's product in float32, best of three."""
    a = mx.ones((SIZE, SIZE))
    mx.eval(a)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(a @ a.T)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best


def machine() -> dict[str, str | int]:
    """What the machine is, without its name."""
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
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit that this package is at, where it is a checkout; + for one with changes."""
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
    """Why times cannot be compared with mlx-lm's, if so.

    Args:
        packed: whether the model is quantized.
        kernel: what this package multiplies packed matrices with: fused, dequantize or auto.
        sliced: whether its plan computes MLPs in slices, which it unpacks whatever the kernel.
    """
    if not packed or not on_cpu() or (kernel == "fused" and not sliced):
        return None
    return (
        "it unpacks quantized matrices where mlx-lm multiplies with packed ones, which is much "
        "slower on a CPU, so that a ratio would be one of kernels (docs/benchmarks.md)"
    )
