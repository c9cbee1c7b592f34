"""Unpacking equals `mx.dequantize`, bit for bit."""

import mlx.core as mx
import pytest
from peaks import above, lowest

from mlx_edgelora.layers.dequantize import dequantize


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_packings(bits, group_size, dtype):
    how = {"group_size": group_size, "bits": bits}
    packed = mx.quantize(mx.random.normal((37, 256)).astype(dtype), **how)
    got, expected = dequantize(*packed, **how), mx.dequantize(*packed, **how)
    assert (got.dtype, got.shape) == (dtype, (37, 256))
    assert mx.array_equal(got, expected).item()


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_other_modes(mode, group_size, bits):
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    packed = mx.quantize(mx.random.normal((5, 64)), **how)
    assert mx.array_equal(dequantize(*packed, **how), mx.dequantize(*packed, **how)).item()


def test_a_slice_of_rows_and_a_gather_of_rows():
    packed = mx.quantize(mx.random.normal((37, 128)), group_size=64, bits=4)
    whole = mx.dequantize(*packed, group_size=64, bits=4)
    some = mx.array([30, 2, 2])
    for rows in (slice(3, 9), some):
        got = dequantize(*(array[rows] for array in packed), group_size=64, bits=4)
        assert mx.array_equal(got, whole[rows]).item()


def test_stacks_of_matrices():
    packed = mx.quantize(mx.random.normal((3, 8, 64)), group_size=32, bits=4)
    how = {"group_size": 32, "bits": 4}
    assert mx.array_equal(dequantize(*packed, **how), mx.dequantize(*packed, **how)).item()


def test_memory_is_one_and_a_half_times_the_result(memory):
    packed = mx.quantize(mx.random.normal((512, 4096)), group_size=64, bits=4)
    mx.eval(packed)
    bound = 1.6 * 512 * 4096 * 4

    def result():
        mx.eval(result := dequantize(*packed, group_size=64, bits=4))
        return result

    assert lowest(lambda: above(result), bound) < bound
