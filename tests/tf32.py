"""Products of float32 as TF32 makes them (CUDA, Metal on an M5): of inputs cut to 10 bits."""

from contextlib import contextmanager

import mlx.core as mx
import pytest

BITS = 10


def rounded(x: mx.array, bits: int = BITS) -> mx.array:
    """Float32 rounded to so many bits; gradients pass through. Other dtypes as they are."""
    if x.dtype != mx.float32:
        return x
    unit = 1 << (23 - bits)
    up = x.view(mx.uint32) + mx.array(unit // 2, mx.uint32)
    short = (up & mx.array(2**32 - unit, mx.uint32)).view(mx.float32)
    return x + mx.stop_gradient(short - x)


@contextmanager
def tf32(least: int = 1, bits: int = BITS):
    """Let products be so, of at least so many rows: a GPU has other kernels for few of them."""

    def of(x):
        return rounded(x, bits) if x.ndim > 1 and x.shape[-2] >= least else x

    with pytest.MonkeyPatch.context() as patch:
        matmul, add = mx.array.__matmul__, mx.addmm
        packed, attend = mx.quantized_matmul, mx.fast.scaled_dot_product_attention

        def product(a, b):
            short = of(a)
            return matmul(a, b) if short is a else matmul(short, rounded(b, bits))

        patch.setattr(mx.array, "__matmul__", product)
        patch.setattr(mx, "matmul", product)
        patch.setattr(mx, "addmm", lambda c, a, b, *rest, **how: add(c, of(a), b, *rest, **how))
        patch.setattr(mx, "quantized_matmul", lambda x, *rest, **how: packed(of(x), *rest, **how))
        patch.setattr(
            mx.fast,
            "scaled_dot_product_attention",
            lambda q, k, v, **how: attend(of(q), rounded(k, bits), rounded(v, bits), **how),
        )
        yield
