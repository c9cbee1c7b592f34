"""Probes of the machine: versions, device, memory, footprint of the process."""

import os
import platform
import subprocess
from pathlib import Path

import mlx.core as mx

from mlx_edgelora.benchmark.machine import commit, machine
from mlx_edgelora.benchmark.machine import versions as package_versions
from mlx_edgelora.checkup.job import Checkup, Found
from mlx_edgelora.measure.meter import footprint as footprint_now
from mlx_edgelora.planner.machine import default_budget, free_memory

# Prefixes of environment variables of MLX and of the macOS driver that affect measurements.
SETTINGS = ("MLX_", "AGX_")


def versions(job: Checkup) -> Found:
    """Versions of the system, the hardware and the packages."""
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
    """The device on which MLX computes."""
    return {
        "default": str(mx.default_device()),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "info": dict(mx.device_info()),
    }


def memory(job: Checkup) -> Found:
    """Free memory as the system reports it, and the default budget."""
    budget, why = default_budget()
    text = _command_output("vm_stat") or _file("/proc/meminfo", "Mem") or ""
    return {
        "free_bytes": free_memory(),
        "budget_bytes": budget,
        "budget_why": why,
        # On macOS, pressure is 1 (normal), 2 (warning) or 4 (critical).
        "pressure": _command_output("sysctl", "-n", "kern.memorystatus_vm_pressure_level")
        or _file("/proc/pressure/memory", "some"),
        "free_percent": _command_output("sysctl", "-n", "kern.memorystatus_level"),
        "system_says": text.splitlines(),
    }


def footprint(job: Checkup) -> Found:
    """Memory of the process at the start and at the end."""
    mx.clear_cache()
    return {
        "before_bytes": job.footprint,
        "after_bytes": footprint_now(),
        "active_bytes": mx.get_active_memory(),
        "cache_bytes": mx.get_cache_memory(),
    }


def _command_output(*command: str) -> str | None:
    """The output of a system program; None if it is missing or fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _file(path: str, begin: str) -> str | None:
    """The lines of a file that begin with `begin`; None if it cannot be read."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return "\n".join(line for line in lines if line.startswith(begin))
