"""Of the machine itself: versions, device, memory, what the process takes."""

import os
import platform
import subprocess
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.benchmark.machine import commit, machine
from mlx_edgelora.benchmark.machine import versions as package_versions
from mlx_edgelora.checkup.job import Checkup, Found
from mlx_edgelora.measure.meter import footprint as footprint_now
from mlx_edgelora.planner.machine import default_budget

# Settings of MLX and of macOS's driver that change what is measured.
SETTINGS = ("MLX_", "AGX_")


def versions(job: Checkup) -> Found:
    """System, hardware, packages."""
    return {
        "system": platform.system(),
        "version": platform.mac_ver()[0] or platform.release().partition("-")[0],
        "architecture": platform.machine(),
        "rosetta": _command_output("sysctl", "-n", "sysctl.proc_translated") == "1",
        "model": _command_output("sysctl", "-n", "hw.model"),
        "chip": _command_output("sysctl", "-n", "machdep.cpu.brand_string")
        or machine()["processor"],
        **{name: machine()[name] for name in ("cores", "memory_bytes", "blas")},
        **package_versions(),
        "commit": commit(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }


def device(job: Checkup) -> Found:
    """What MLX computes on."""
    return {
        "default": str(mx.default_device()),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "info": dict(mx.device_info()),
    }


def memory(job: Checkup) -> Found:
    """What is free by the system's own words, and the budget that comes of it."""
    budget, why = default_budget()
    text = _command_output("vm_stat") or _file("/proc/meminfo", "Mem") or ""
    return {
        "budget_bytes": budget,
        "budget_why": why,
        # macOS: 1 is normal, 2 a warning, 4 critical; and percent that are free.
        "pressure": _command_output("sysctl", "-n", "kern.memorystatus_vm_pressure_level")
        or _file("/proc/pressure/memory", "some"),
        "free_percent": _command_output("sysctl", "-n", "kern.memorystatus_level"),
        "system_says": text.splitlines(),
    }


def footprint(job: Checkup) -> Found:
    """What the process takes at the end, and did at the start."""
    mx.clear_cache()
    return {
        "before_bytes": job.footprint,
        "after_bytes": footprint_now(),
        "active_bytes": mx.get_active_memory(),
        "cache_bytes": mx.get_cache_memory(),
    }


def _command_output(*command: str) -> str | None:
    """What a program of the system prints; None where there is none."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _file(path: str, begin: str) -> str | None:
    """Lines of a file that begin so; None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return "\n".join(line for line in lines if line.startswith(begin))
