"""How a CPU multiplies: MLX's fused quantized kernel against dequantize and multiply.

    python benchmarks/kernels.py
    LD_PRELOAD=libopenblas.so.0 python benchmarks/kernels.py

Best of three, 1024 rows by a 3072 x 3072 matrix, 4-bit in groups of 64. These machines are
shared: read the figures as ratios within one run. The errors are relative to float32.
"""

import os
import time
from collections.abc import Callable

import mlx.core as mx

ROWS, DIMS = 1024, 3072
HOW = {"group_size": 64, "bits": 4}


def seconds(product: Callable[[], mx.array]) -> float:
    """Shortest of three times, after one that does not count."""
    mx.eval(product())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(product())
        times.append(time.perf_counter() - start)
    return min(times)


def error(dtype: mx.Dtype, x: mx.array, packed: list[mx.array]) -> tuple[float, float]:
    """Relative error of the fused and of the dequantized product of 16 rows in `dtype`."""
    weight, *rest = packed
    low = [weight, *(array.astype(dtype) for array in rest)]
    exact = [weight, *(array.astype(mx.float32) for array in low[1:])]
    rows = x[:16].astype(dtype)
    expected = rows.astype(mx.float32) @ mx.dequantize(*exact, **HOW).T
    products = mx.quantized_matmul(rows, *low, **HOW), rows @ mx.dequantize(*low, **HOW).T
    return tuple(
        (mx.linalg.norm(p.astype(mx.float32) - expected) / mx.linalg.norm(expected)).item()
        for p in products
    )


def main() -> None:
    """Print times in float32 and errors in bfloat16."""
    x = mx.random.normal((ROWS, DIMS), key=mx.random.key(0))
    matrix = mx.random.normal((DIMS, DIMS), key=mx.random.key(1))
    packed = list(mx.quantize(matrix, **HOW))
    mx.eval(x, matrix, packed)
    print(f"preloaded: {os.environ.get('LD_PRELOAD') or 'nothing'}")
    print(f"float32 product: {seconds(lambda: x @ matrix.T):.3f} s")
    print(f"fused quantized: {seconds(lambda: mx.quantized_matmul(x, *packed, **HOW)):.3f} s")
    print(f"dequantize, multiply: {seconds(lambda: x @ mx.dequantize(*packed, **HOW).T):.3f} s")
    fused, dequantized = error(mx.bfloat16, x, packed)
    print(f"bfloat16 error: fused {fused:.1%}, dequantized {dequantized:.1%}")


if __name__ == "__main__":
    main()
