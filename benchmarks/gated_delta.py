"""The gated delta rule forward and backward: in chunks, and as mlx-lm's loop.

    python benchmarks/gated_delta.py --tokens 256 512
    python benchmarks/gated_delta.py --tokens 2048 --rounds 1
    python benchmarks/gated_delta.py --tokens 2048 --channels --chunks-only

Heads of Qwen3-Next and Qwen 3.5: 16 key and 32 value heads of 128, float32, batch 1; with
--channels one decay a channel and 32 key heads, as Kimi Linear has. Peaks are above the inputs, the
buffer cache is off. The two alternate, and the shortest of --rounds counts. mlx-lm's loop needs
8.4 MB a token. `off` is the largest difference of an array, relative to its norm, gradients
included.
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops

from mlx_edgelora.layers.gated_delta import gated_delta

SIZE = 128


def inputs(tokens: int, channels: bool) -> tuple[list[mx.array], list[mx.array]]:
    """q, k, v, g, beta and state as a block makes them, and cotangents of both outputs."""
    values, keys = 32, 32 if channels else 16
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, tokens, heads, SIZE)) for heads in (keys, keys, values))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    size = (1, tokens, values, SIZE) if channels else (1, tokens, values)
    g = mx.exp(-mx.random.uniform(shape=size))
    beta = mx.random.uniform(shape=(1, tokens, values))
    arrays = [q * SIZE**-0.5, k, v, g, beta, mx.zeros((1, values, SIZE, SIZE))]
    wanted = [mx.random.normal(v.shape), mx.random.normal(arrays[-1].shape)]
    mx.eval(arrays, wanted)
    return arrays, wanted


def measure(
    function: Callable, arrays: list[mx.array], wanted: list[mx.array]
) -> tuple[float, int, list[mx.array]]:
    """Seconds and peak bytes of forward and backward, and the results."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    outputs, gradients = mx.vjp(lambda *a: list(function(*a)), arrays, wanted)
    mx.eval(outputs, gradients)
    seconds = time.perf_counter() - start
    return seconds, mx.get_peak_memory() - before, [*outputs, *gradients]


def difference(got: list[mx.array], expected: list[mx.array]) -> float:
    """The largest difference of an array, relative to the norm of what is expected."""
    return max(
        (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()
        for a, b in zip(got, expected, strict=True)
    )


def row(tokens: int, rounds: int, channels: bool, chunks_only: bool) -> str:
    """One line of the table."""
    arrays, wanted = inputs(tokens, channels)
    ways = (
        {"chunks": gated_delta} if chunks_only else {"chunks": gated_delta, "loop": gated_delta_ops}
    )
    seconds, peaks, off = dict.fromkeys(ways, float("inf")), {}, ""
    for _ in range(rounds):
        found = {}
        for name, function in ways.items():
            spent, peaks[name], found[name] = measure(function, arrays, wanted)
            seconds[name] = min(seconds[name], spent)
        if not chunks_only:
            off = f" {difference(found['chunks'], found['loop']):.0e}"
    cells = [f"{peaks[name] / 2**20:.0f} MiB, {seconds[name]:.2f} s" for name in ways]
    if not chunks_only:
        less = peaks["loop"] / peaks["chunks"], seconds["loop"] / seconds["chunks"]
        cells += [f"{less[0]:.1f} x less memory, {less[1]:.1f} x less time, off{off}"]
    return f"{tokens} tokens: " + " | ".join(cells)


def main() -> None:
    """Print one line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels", action="store_true", help="one decay a channel")
    parser.add_argument("--chunks-only", action="store_true", help="leave mlx-lm's loop out")
    options = parser.parse_args()
    mx.set_cache_limit(0)
    for tokens in options.tokens:
        print(row(tokens, options.rounds, options.channels, options.chunks_only), flush=True)


if __name__ == "__main__":
    main()
