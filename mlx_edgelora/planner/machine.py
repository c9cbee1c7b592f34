"""Measure the rates of a machine that decide the time of a step, and its free memory."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from math import inf
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.linear import resolve_kernel
from mlx_edgelora.measure.meter import footprint, sysctl
from mlx_edgelora.measure.text import say
from mlx_edgelora.storage.device_memory import HostMemory, Part, device_memory, to_numpy
from mlx_edgelora.storage.files import CACHE_ERRORS, error_line, updating, write_atomically
from mlx_edgelora.storage.temporaries import create_unnamed

MIB = 2**20
# Version of the file with the rates. Raise it when the meaning of a rate changes.
VERSION = 3
# The timed product multiplies TOKENS tokens by a square matrix of COLUMNS columns. On a CPU, where
# products with a packed matrix or in 16 bits are slow, these take FEW_TOKENS tokens.
TOKENS, COLUMNS = 512, 2048
FEW_TOKENS = 8
# Operations in one evaluation on a GPU. A single one would take no longer than the call itself.
AT_ONCE = 16
DISK_BYTES = 32 * MIB
# Seconds of warm-up on a GPU before timing: an idle GPU is slow at first.
WARM_UP = 0.2
# Operations that take more seconds than this, such as 16 bits on a CPU, are timed twice.
SLOW = 0.5
# Rates above it are damage.
LARGEST_RATE = 1e18
# Seconds after which rates are measured again: the machine may have been hot or busy.
KEPT = 30 * 24 * 3600
# Metal's names for the GPUs of M1 and M2. They do not support bfloat16 and convert it.
CONVERTS_BFLOAT16 = ("applegpu_g13", "applegpu_g14")
# Share of the available memory that is left to other programs.
MARGIN = 0.2
SHARE = f"{1 - MARGIN:.0%}".replace("%", " %")
# Longest operation in seconds on a Mac. macOS aborts work that blocks the GPU for a few seconds,
# and earlier if the GPU also drives the display.
LONGEST = 0.5
# Timeout in seconds for a system program.
SOON = 5


@dataclass(frozen=True)
class Rates:
    """The measured rates of a machine.

    Attributes:
        flops: floating-point operations per second in a matrix product.
        fused_flops: the same for MLX's product with a packed matrix, forward and backward.
        dequantized: entries of a packed matrix unpacked per second.
        moved: bytes read and written per second by elementwise operations.
        read: bytes read from a file per second.
        written: bytes written to a file per second.
        call: seconds to build and schedule one small operation.
    """

    flops: float
    fused_flops: float
    dequantized: float
    moved: float
    read: float
    written: float
    call: float


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is made for.

    Attributes:
        name: name of the device.
        rates: its measured rates.
        kernels: kernels for packed matrices that a plan may choose from; "auto" is the first.
        key: identifies the device, the dtype and the relevant versions.
        longest: limit in seconds for a single operation, if the plan has a choice.
    """

    name: str
    rates: Rates
    kernels: tuple[str, ...] = ("dequantize",)
    key: str = ""
    longest: float = inf


def this_machine(cache: Path, folder: Path, dtype: mx.Dtype) -> Machine:
    """Measure this machine, or read rates of the last month from a file.

    Rates are kept per dtype and volume.

    Args:
        cache: folder of the file with the rates.
        folder: folder of scratch files; its disk is measured.
        dtype: dtype of activations.

    Raises:
        EdgeLoraError: `folder` cannot be written.
    """
    device = mx.device_info()
    name = f"{device.get('device_name', 'unknown')}, {mx.default_device()}"
    blas = os.environ.get("LD_PRELOAD", "") + os.environ.get("DYLD_INSERT_LIBRARIES", "")
    bits = os.environ.get("MLX_ENABLE_TF32", "")  # precision of float32 products on some GPUs
    key = f"{VERSION} {mx.__version__} {name} {os.cpu_count()} {blas}{bits} {dtype}" + _conditions()
    file = cache / "machine.json"
    known = _read(file)
    with _scratch_file(folder):  # fails if the folder cannot be written, even with known rates
        place = f"{key} {_volume(folder)}"
    if place not in known:
        known[place] = measure_rates(folder, dtype), time.time()
        _add(file, place, known[place])
    rates, _ = known[place]
    # On a CPU, MLX's kernel is slow and less exact in 16 bits (`layers/linear.py`): not offered.
    kernels = ("fused", "dequantize") if resolve_kernel("auto")[0] == "fused" else ("dequantize",)
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    return Machine(name, rates, kernels, key, LONGEST if on_metal else inf)


def converts_dtype(dtype: mx.Dtype) -> bool:
    """Whether the GPU has to convert numbers of this dtype, which takes time."""
    architecture = str(mx.device_info().get("architecture", ""))
    return dtype == mx.bfloat16 and architecture.startswith(CONVERTS_BFLOAT16)


def _conditions() -> str:
    """Version and power mode of macOS, if known, because rates depend on them; else empty."""
    if sys.platform != "darwin":
        return ""
    command = ["pmset", "-g"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout
    except (OSError, subprocess.SubprocessError, ValueError):
        text = ""
    # lowpowermode is 0 or 1. Some Macs have powermode instead, which is 2 for high power.
    modes = [" ".join(line.split()[:2]) for line in text.splitlines() if "powermode" in line]
    return " ".join(["", "macOS", platform.mac_ver()[0], *modes])


def measure_rates(folder: Path, dtype: mx.Dtype) -> Rates:
    """Time each operation; takes one or two seconds and about 60 MiB."""
    keys = mx.random.split(mx.random.key(0))  # does not change MLX's global random state
    x = mx.random.normal((TOKENS, COLUMNS), key=keys[0]).astype(dtype)
    dense = mx.random.normal((COLUMNS, COLUMNS), key=keys[1]).astype(dtype)
    packed = mx.quantize(dense, 64, 4)
    small = mx.zeros((8,))
    mx.eval(x, dense, packed, small)
    on_gpu = mx.default_device() == mx.gpu
    times, some = (AT_ONCE, x) if on_gpu else (1, x[:FEW_TOKENS])
    rows = x if dtype == mx.float32 else some
    a_token = 2.0 * COLUMNS * COLUMNS
    if on_gpu:
        begun = time.perf_counter()
        while time.perf_counter() - begun < WARM_UP:
            mx.eval(x @ dense.T)

    def chain() -> mx.array:
        y = small
        for _ in range(100):
            y = y + 1
        return y

    def fused() -> mx.array:
        return mx.quantized_matmul(mx.quantized_matmul(some, *packed), *packed, transpose=False)

    read, written = _disk(folder)
    return Rates(
        flops=a_token * rows.shape[0] / _seconds(lambda: rows @ dense.T, times),
        fused_flops=2 * a_token * some.shape[0] / _seconds(fused, times),
        dequantized=dense.size / _seconds(lambda: mx.dequantize(*packed), times),
        moved=3.0 * x.nbytes / _seconds(lambda: x * x + x, times),
        read=read,
        written=written,
        call=_seconds(chain) / 100,
    )


def _seconds(function: Callable[[], mx.array], times: int = 1, rounds: int = 3) -> float:
    """Seconds of one call, the best of `rounds` evaluations of `times` calls after a warm-up.

    On a CPU, which compiles nothing for it, the warm-up counts as well. What is slow once may be
    the system's doing, so a slow operation is evaluated twice.
    """
    best, compiles = inf, mx.default_device() == mx.gpu
    for number in range(rounds + 1):
        start = time.perf_counter()
        mx.eval([function() for _ in range(times)])
        spent = time.perf_counter() - start
        if number or not compiles:
            best = min(best, spent / times)
        if number and spent > SLOW:
            break
    return max(best, 1e-9)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes moved per second from a file to arrays and back, through the system's cache."""
    memory, best = device_memory(), [inf, inf]
    array, pages = mx.zeros((DISK_BYTES,), mx.uint8), np.zeros((DISK_BYTES,), np.uint8)
    mx.eval(array)
    view = memoryview(to_numpy(array))
    memory.hold(view)
    with _scratch_file(folder) as file:
        for _ in range(3):
            start = time.perf_counter()
            file.seek(0)
            if isinstance(memory, HostMemory):
                file.write(view)
            else:
                memory.save(view, memoryview(pages))
                file.write(pages)
            file.flush()
            middle = time.perf_counter()
            memory.fill([Part(folder, file.fileno(), 0, view)])
            best = [min(best[0], time.perf_counter() - middle), min(best[1], middle - start)]
    return DISK_BYTES / max(best[0], 1e-9), DISK_BYTES / max(best[1], 1e-9)


@contextmanager
def _scratch_file(folder: Path) -> Iterator[BinaryIO]:
    try:
        with create_unnamed(folder) as file:
            yield file
    except OSError as error:
        raise EdgeLoraError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with "
            "--spill-dir"
        ) from error


def _volume(folder: Path) -> Path:
    """Mount point of the folder's volume; all folders of a volume are equally fast."""
    here = folder.resolve()
    return next(parent for parent in (here, *here.parents) if parent.is_mount())


def default_budget() -> tuple[int, str]:
    """Default memory budget in bytes, and its reason."""
    device = mx.device_info()
    if "free_memory" in device and mx.default_device() == mx.gpu:  # CUDA: not the host's memory
        free = int((1 - MARGIN) * device["free_memory"])
        return free, f"{SHARE} of the GPU's free memory"
    most = device.get("max_recommended_working_set_size") if mx.metal.is_available() else None
    free = free_memory()
    left = None if free is None else int((1 - MARGIN) * free)
    if most is not None and (left is None or most <= left):
        return int(most), "what the system recommends for the GPU"
    if left is not None:
        return left, f"{SHARE} of what is free"
    return int((1 - MARGIN) * _physical()) - footprint(), f"{SHARE} of the memory"


def free_memory() -> int | None:
    """Available memory in bytes; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        )
    except (OSError, StopIteration, ValueError, IndexError):
        return _free_to_mach()
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int(Path("/sys/fs/cgroup", name).read_text())
        except (OSError, ValueError):
            continue
        return max(0, min(free, limit - footprint()))
    return free


def _free_to_mach() -> int | None:
    """Available memory on macOS: free, inactive and speculative pages, by `vm_stat`.

    Purgeable pages are included in these. The share of memory that the kernel reports as available
    is an upper bound.
    """
    import subprocess  # noqa: PLC0415 - only on macOS

    try:
        text = subprocess.run(
            ["vm_stat"], capture_output=True, text=True, check=True, timeout=SOON
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = text.splitlines()
    size = int("".join(filter(str.isdigit, lines[0] if lines else "")) or 4096)
    kinds = ("Pages free:", "Pages inactive:", "Pages speculative:")
    counts = [line.rpartition(":")[2].strip(" .") for line in lines if line.startswith(kinds)]
    if not counts or not all(map(str.isdigit, counts)):
        return None
    free, level = size * sum(map(int, counts)), sysctl("kern.memorystatus_level")
    return free if level is None else min(free, _physical() * level // 100)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(file: Path) -> dict[str, tuple[Rates, float]]:
    """Rates that are not too old, and their time of measurement in seconds since 1970."""
    try:
        known = {
            key: (Rates(**entry["rates"]), float(entry["measured"]))
            for key, entry in json.loads(file.read_bytes()).items()
        }
        if not all(_is_rate(rate) for rates, _ in known.values() for rate in astuple(rates)):
            raise ValueError("a rate is no positive number")
    except FileNotFoundError:
        return {}
    except CACHE_ERRORS as error:
        say(f"note: {file}: cannot be used ({error_line(error)}); this machine is measured again")
        return {}
    now = time.time()
    return {key: entry for key, entry in known.items() if 0 <= now - entry[1] < KEPT}


def _is_rate(rate: object) -> bool:
    return isinstance(rate, float) and 0 < rate < LARGEST_RATE


def _add(file: Path, place: str, entry: tuple[Rates, float]) -> None:
    """Add rates to the file; other processes may do the same."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with updating(file.parent):
            known = _read(file) | {place: entry}
            entries = {k: {"rates": asdict(r), "measured": when} for k, (r, when) in known.items()}
            text = json.dumps(entries, indent=1)
            write_atomically({file: lambda target: target.write(text.encode())})
    except (OSError, EdgeLoraError):
        return  # measured again next time
