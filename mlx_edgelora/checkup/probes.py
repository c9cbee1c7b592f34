"""Probes of MLX and the disk: precision, mapped memory, attention, rates, syncing."""

import fcntl
import mmap
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product

import mlx.core as mx
import numpy as np

from mlx_edgelora.checkup.job import Checkup, Found, best_seconds, environment_variable, run_probe
from mlx_edgelora.measure.meter import footprint
from mlx_edgelora.model.loading import DTYPES
from mlx_edgelora.planner.machine import measure_rates
from mlx_edgelora.storage.temporaries import create_unnamed

# Largest relative error of a float32 product; above it, products have lower precision (TF32).
FLOAT32_ERROR = 1e-5
# Environment variable with the size of a block of scores in MLX's gradient of attention on Metal.
BLOCK = "MLX_SDPA_VJP_BLOCK"
BLOCKS = (1024, 256)
ROUNDS = 3
# Number of small evaluations that are timed; the fastest counts.
EVALUATIONS = 20
CALLS = ("F_FULLFSYNC", "F_NOCACHE", "F_PREALLOCATE", "F_RDADVISE")


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return mx.default_device() == mx.gpu


def precision(job: Checkup) -> Found:
    """Relative error of a product in float32."""
    a, b = (np.random.RandomState(i).randn(64, 2048).astype(np.float32) for i in (0, 1))
    exact = a.astype(np.float64) @ b.T
    got = np.array(mx.array(a) @ mx.array(b).T)
    error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    return {"relative_error": error, "tf32": error > FLOAT32_ERROR}


def wrap(job: Checkup) -> Found:
    """Whether MLX uses mapped memory without a copy, with aligned and other starts and lengths."""
    page, size = mmap.PAGESIZE, job.sizes.disk_bytes
    cases = ((0, page), (page, page + 512), (2 * page, 3 * page - 2), (512, page), (0, size))
    with create_unnamed(job.folder) as file:
        file.truncate(size)
        pages = np.memmap(file, np.uint8, "r+", shape=(size,))
        pages[:] = np.arange(size, dtype=np.uint32) % 251
        rows = [
            {"start": start, "bytes": count} | run_probe(_wrap_region, pages[start : start + count])
            for start, count in cases
        ]
        file.seek(page)
        agrees = file.read(page) == bytes(pages[page : 2 * page])
    return {"page_bytes": page, "mapping_is_read_back": agrees, "wraps": rows}


def _wrap_region(region: np.ndarray) -> Found:
    held, charged = mx.get_active_memory(), footprint()
    array = mx.asarray(region, copy=False)
    right = mx.array_equal(array + 0, mx.array(region.copy())).item()
    mx.clear_cache()
    return {
        "right": right,
        "active_bytes": mx.get_active_memory() - held,
        "footprint_bytes": footprint() - charged,
    }


def attention(job: Checkup) -> Found:
    """Peak and time of MLX's causal attention, for the forward alone and with its gradient."""
    sizes = job.sizes
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    blocks = BLOCKS if on_gpu() else BLOCKS[:1]  # a CPU has no such blocks
    calls = []
    for size, block, gradient in product(sizes.head_sizes, blocks, (False, True)):
        shape = (1, sizes.heads, sizes.tokens, size)
        row = {"head_size": size, "block": block, "gradient": gradient}
        with environment_variable(BLOCK, str(block)):  # read at every call
            calls.append(row | run_probe(_time_attention, job, shape, dtype, gradient))
    shared = {"rows": 1, "heads": sizes.heads, "tokens": sizes.tokens, "itemsize": dtype.size}
    return {**shared, "calls": calls}


def _time_attention(job: Checkup, shape: tuple[int, ...], dtype: mx.Dtype, gradient: bool) -> Found:
    job.check_time()
    keys = mx.random.split(mx.random.key(0), 3)
    qkv = [mx.random.normal(shape, key=key).astype(dtype) for key in keys]
    mx.eval(qkv)

    def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal")

    def once() -> None:
        mx.eval(mx.vjp(call, qkv, qkv[:1]) if gradient else call(*qkv))

    if on_gpu():
        once()
    mx.synchronize()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds = best_seconds(once, ROUNDS if on_gpu() else 1)
    return {"peak_bytes": mx.get_peak_memory() - held, "seconds": seconds}


def rates(job: Checkup) -> Found:
    """The planner's rates by dtype, and the time of a minimal evaluation."""
    one = mx.zeros((8,))
    evaluation = best_seconds(lambda: mx.eval(one + 1), EVALUATIONS)
    found = [{"dtype": name} | run_probe(_rates, job, DTYPES[name]) for name in job.sizes.dtypes]
    return {"evaluation_seconds": evaluation, "rates": found}


def _rates(job: Checkup, dtype: mx.Dtype) -> Found:
    job.check_time()
    return asdict(measure_rates(job.folder, dtype))


def disk(job: Checkup) -> Found:
    """Free space, seconds of writing, syncing and reading a file, and available system calls."""
    free = shutil.disk_usage(job.folder).free
    data = os.urandom(job.sizes.disk_bytes)
    with create_unnamed(job.folder) as file:
        steps = {
            "write": lambda: file.write(data),
            "fsync": lambda: os.fsync(file.fileno()),
            "full sync": lambda: fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC),
            "read": lambda: (file.seek(0), file.read(len(data))),
        }
        if not hasattr(fcntl, "F_FULLFSYNC"):
            del steps["full sync"]
        rows = [{"what": name} | run_probe(_time_step, step) for name, step in steps.items()]
    for row in rows:
        if row["what"] in ("write", "read") and "seconds" in row:
            row["bytes_per_second"] = round(len(data) / max(row["seconds"], 1e-9))
    calls = [name for name in CALLS if hasattr(fcntl, name)]
    calls += ["posix_fallocate"] * hasattr(os, "posix_fallocate")
    return {"free_bytes": free, "file_bytes": len(data), "calls": ", ".join(calls), "times": rows}


def _time_step(step: Callable[[], object]) -> Found:
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start}
