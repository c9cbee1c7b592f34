"""Peak and time of attention, forward and backward: in tiles, and MLX's own.

    LD_PRELOAD=libopenblas.so.0 python benchmarks/attention.py 1024 2048

Heads of Llama-3.2-3B (24 query heads, 8 key heads, head size 128), causal, float32. Peaks are
above the inputs, output and gradients included. The two alternate three times and the shortest
counts. MLX's own needs 6 GiB at 4096 tokens on a CPU: add `tiles` to leave it out.
"""

import gc
import sys
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_edgelora.layers.attention import tiled_attention

HEADS, KV_HEADS, SIZE = 24, 8, 128
MIB = 2**20


def measure(attend: Callable, arrays: list[mx.array], cotangent: mx.array) -> tuple[float, float]:
    """MiB above what is there before, and seconds."""
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    results = mx.vjp(attend, arrays, [cotangent])
    mx.eval(results)
    return (mx.get_peak_memory() - before) / MIB, time.perf_counter() - start


def compare(tokens: int, with_mlx: bool) -> None:
    """Print a line for every size of the tiles."""
    shapes = [(1, heads, tokens, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *arrays, cotangent = (mx.random.normal(shape) for shape in shapes)
    mx.eval(arrays, cotangent)
    options = {"scale": SIZE**-0.5, "mask": "causal"}
    ways = {"MLX": lambda *x: mx.fast.scaled_dot_product_attention(*x, **options)}
    if not with_mlx:
        ways.clear()
    for tile in (MIB // 2, MIB, 2 * MIB, 4 * MIB, 8 * MIB):
        ways[f"tiles of {tile / MIB} MiB"] = lambda *x, tile=tile: tiled_attention(
            *x, **options, tile_bytes=tile
        )
    results = {name: [] for name in ways}
    for _ in range(3):
        for name, attend in ways.items():
            results[name].append(measure(attend, arrays, cotangent))
    held = 2 * sum(x.nbytes for x in arrays[:2]) / MIB
    print(f"{tokens} tokens; output and gradients are {held:.0f} MiB")
    for name, runs in results.items():
        peaks, times = zip(*runs, strict=True)
        print(f"  {name}: peak {max(peaks):.1f} MiB, {min(times):.2f} s")


if __name__ == "__main__":
    mx.set_cache_limit(0)
    mx.random.seed(0)
    for argument in sys.argv[1:]:
        if argument != "tiles":
            compare(int(argument), "tiles" not in sys.argv)
