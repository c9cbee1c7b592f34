"""How fast streamed weights come from a warm cache, beside `os.preadv` into the same memory.

    python benchmarks/reading.py
    python benchmarks/reading.py --shape llama-3.2-3b --blocks 4

A block of the shape is read again and again, in turn by `StreamedWeights` (with every check and
the dictionary that a step gets), by `mx.load` as before, and by one `preadv` of as many bytes.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_edgelora.benchmark.shapes import SHAPES, checkpoint, default_cache
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.model.loading import attach, open_model
from mlx_edgelora.model.lora import add_lora


def main() -> None:
    """Print bytes a second, and ratios of readings that followed one another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cache", type=Path, default=default_cache())
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    mx.set_cache_limit(0)
    folder = checkpoint(args.cache, args.shape, args.blocks)
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    add_lora(lazy.model, 1)
    weights = attach(lazy, streamed=True, dtype=None, meter=DiskMeter()).weights
    size = sum(array.nbytes for array in weights.block(0).values())
    shard = next(folder.glob("*.safetensors"))
    view, number = memoryview(np.zeros(size, np.uint8)), 0
    with shard.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        names = [name for name in mx.load(str(shard)) if ".layers.0." in name]

        def plain() -> None:
            done = 0
            while done < size:
                done += os.preadv(descriptor, [view[done:]], done)

        def streamed() -> None:
            nonlocal number
            number = (number + 1) % args.blocks
            weights.block(number)

        def loaded() -> None:
            arrays = mx.load(str(shard))
            mx.eval([arrays[name] for name in names])

        ways = {"preadv, memory used again": plain, "streamed": streamed, "mx.load": loaded}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, read in ways.items():
                start = time.perf_counter()
                read()
                times[name].append(time.perf_counter() - start)
    weights.close()
    print(f"a block of {size / 1e6:.1f} MB\n\n| way | GB/s | of preadv's speed |\n|---|---|---|")
    for name, own in times.items():
        first = times["preadv, memory used again"]
        share = statistics.median(a / b for a, b in zip(first, own, strict=True))
        print(f"| {name} | {size / statistics.median(own) / 1e9:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
