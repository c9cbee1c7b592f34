"""How fast a machine is at what a step is made of, and how much memory it has to give."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.linear import resolve_kernel
from mlx_edgelora.measure.meter import footprint, sysctl
from mlx_edgelora.storage.files import write_atomically
from mlx_edgelora.storage.page_file import unlinked_file

MIB = 2**20
# Of the file that rates are kept in: raise it when they mean something else.
VERSION = 2
# A product of so many tokens by a square matrix of so many columns is timed. With fewer tokens on
# a CPU where it is slow: with a packed matrix, and in 16 bits.
TOKENS, COLUMNS = 512, 2048
FEW_TOKENS = 8
# So many in one evaluation on a GPU: alone one takes as long as the call.
AT_ONCE = 16
DISK_BYTES = 32 * MIB
# So long in seconds a GPU computes before it is timed: one that was idle is slow at first.
WARM_UP = 0.2
# What takes longer in seconds is timed once: 16 bits on a CPU.
SLOW = 0.5
# So long in seconds rates are kept: a machine may have been hot, or busy, when it was measured.
KEPT = 30 * 24 * 3600
# What Metal calls the GPUs of M1 and M2, which have no bfloat16 and convert it.
CONVERTS_BFLOAT16 = ("applegpu_g13", "applegpu_g14")
# Of the memory that is free or can be freed, so much is left to other programs.
MARGIN = 0.2
SHARE = f"{1 - MARGIN:.0%}".replace("%", " %")
# macOS ends what holds the GPU for some seconds, sooner where it draws the display.
LONGEST = 0.5
# Seconds that a program of the system may take to answer.
SOON = 5


@dataclass(frozen=True)
class Rates:
    """What was measured on a machine.

    Attributes:
        flops: floating-point operations a second in a product of matrices.
        fused_flops: the same in MLX's product with a packed matrix.
        dequantized: entries of a packed matrix that are unpacked in a second.
        moved: bytes a second that operations entry by entry read and write.
        read, written: bytes a second from and to a file.
        call: seconds that building and scheduling one small operation takes.
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
    """Where a plan is carried out.

    Attributes:
        name: of the device.
        rates: how fast it is.
        kernels: ways to multiply packed matrices that a plan may choose from; the first is what
            "auto" means.
        key: what tells it, with the versions that count, from others.
        longest: seconds that a plan lets one operation take, where there is a choice.
    """

    name: str
    rates: Rates
    kernels: tuple[str, ...] = ("dequantize",)
    key: str = ""
    longest: float = inf


def this_machine(cache: Path, folder: Path, dtype: mx.Dtype) -> Machine:
    """This machine, measured per dtype and volume and kept in a file for a month.

    Args:
        cache: folder of that file.
        folder: of scratch files, whose disk is measured.
        dtype: of activations.
    """
    device = mx.device_info()
    name = f"{device.get('device_name', 'unknown')}, {mx.default_device()}"
    blas = os.environ.get("LD_PRELOAD", "") + os.environ.get("DYLD_INSERT_LIBRARIES", "")
    bits = os.environ.get("MLX_ENABLE_TF32", "")  # of a product of float32 on some GPUs
    key = f"{VERSION} {mx.__version__} {name} {os.cpu_count()} {blas}{bits} {dtype}" + _conditions()
    file = cache / "machine.json"
    known = _read(file)
    with _scratch_file(folder):  # what cannot be written is refused, whatever is known
        place = f"{key} {_volume(folder)}"
    if place not in known:
        known[place] = measure_rates(folder, dtype), time.time()
        _write(file, known)
    rates, _ = known[place]
    # Slow on a CPU, and less exact in 16 bits there (`layers/linear.py`): no plan's choice.
    kernels = ("fused", "dequantize") if resolve_kernel("auto")[0] == "fused" else ("dequantize",)
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    return Machine(name, rates, kernels, key, LONGEST if on_metal else inf)


def converts_dtype(dtype: mx.Dtype) -> bool:
    """Whether the GPU has to convert numbers of this type, which takes time."""
    architecture = str(mx.device_info().get("architecture", ""))
    return dtype == mx.bfloat16 and architecture.startswith(CONVERTS_BFLOAT16)


def _conditions() -> str:
    """On macOS its version and the power mode, as far as they can be told: rates depend on them."""
    if sys.platform != "darwin":
        return ""
    command = ["pmset", "-g"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout
    except (OSError, subprocess.SubprocessError, ValueError):
        text = ""
    # lowpowermode is 0 or 1; in its place some Macs have powermode, which is 2 for high power.
    modes = [" ".join(line.split()[:2]) for line in text.splitlines() if "powermode" in line]
    return " ".join(["", "macOS", platform.mac_ver()[0], *modes])


def measure_rates(folder: Path, dtype: mx.Dtype) -> Rates:
    """Time each operation; takes a second or two, and some 60 MiB."""
    keys = mx.random.split(mx.random.key(0))  # MLX's own generator is not moved
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

    read, written = _disk(folder)
    return Rates(
        flops=a_token * rows.shape[0] / _seconds(lambda: rows @ dense.T, times),
        fused_flops=a_token
        * some.shape[0]
        / _seconds(lambda: mx.quantized_matmul(some, *packed), times),
        dequantized=dense.size / _seconds(lambda: mx.dequantize(*packed), times),
        moved=3.0 * x.nbytes / _seconds(lambda: x * x + x, times),
        read=read,
        written=written,
        call=_seconds(chain) / 100,
    )


def _seconds(function: Callable[[], mx.array], times: int = 1, rounds: int = 3) -> float:
    """Of one of so many in an evaluation, in the fastest of some; the first one warms up."""
    best = float("inf")
    for number in range(rounds + 1):
        start = time.perf_counter()
        mx.eval([function() for _ in range(times)])
        spent = time.perf_counter() - start
        if number or spent > SLOW:
            best = min(best, spent / times)
        if spent > SLOW:
            break
    return max(best, 1e-9)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes a second read and written, through the system's cache as spilling does."""
    data, best = bytes(DISK_BYTES), [float("inf"), float("inf")]
    with _scratch_file(folder) as file:
        for _ in range(2):
            file.seek(0)
            start = time.perf_counter()
            file.write(data)
            middle = time.perf_counter()
            file.seek(0)
            file.read(DISK_BYTES)
            best = [
                min(best[0], time.perf_counter() - middle),
                min(best[1], middle - start),
            ]
    return DISK_BYTES / max(best[0], 1e-9), DISK_BYTES / max(best[1], 1e-9)


@contextmanager
def _scratch_file(folder: Path) -> Iterator[BinaryIO]:
    try:
        with unlinked_file(folder) as file:
            yield file
    except OSError as error:
        raise EdgeLoraError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with "
            "--spill-dir"
        ) from error


def _volume(folder: Path) -> Path:
    """Where the folder's volume is mounted: all folders of a volume are equally fast."""
    here = folder.resolve()
    return next(parent for parent in (here, *here.parents) if parent.is_mount())


def default_budget() -> tuple[int, str]:
    """Bytes that MLX may take when nobody says how many, and why so many."""
    device = mx.device_info()
    if "free_memory" in device and mx.default_device() == mx.gpu:  # CUDA: the host's is another
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
    """Bytes that are free or can be freed, as far as the system tells."""
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
    """macOS: pages that are free, inactive or speculative, by `vm_stat`.

    Purgeable pages are among them already. The kernel's own share of memory that it can give
    is a bound.
    """
    import subprocess  # noqa: PLC0415 - one system's way

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
    """Rates that are not too old, and when they were measured, in seconds since 1970."""
    try:
        known = {
            key: (Rates(**entry["rates"]), float(entry["measured"]))
            for key, entry in json.loads(file.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}  # not there, or of another version: measured again
    now = time.time()
    return {key: entry for key, entry in known.items() if 0 <= now - entry[1] < KEPT}


def _write(file: Path, known: dict[str, tuple[Rates, float]]) -> None:
    entries = {key: {"rates": asdict(r), "measured": when} for key, (r, when) in known.items()}
    text = json.dumps(entries, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({file: lambda target: target.write(text.encode())})
    except (OSError, EdgeLoraError):
        return  # measured again next time
