"""Packed matrices unpacked, in as few passes as the backend allows.

MLX's CPU backend has no kernel for it: `mx.dequantize` becomes shifts, masks, a cast, a
product and a sum over 32-bit lanes. For affine 4-bit, much the most common packing, bytes
can be spread in 16-bit lanes instead, which moves a quarter of the memory; the result is
equal bit for bit and took 0.6 of the time (`benchmarks/speed.py`). On a GPU, and for every
other packing, this is `mx.dequantize`.
"""

import mlx.core as mx


def dequantize(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """Unpack what `mx.quantize` returned for a matrix [out, in].

    Args:
        weight, scales, biases: as `mx.quantize` returns them.
        group_size, bits, mode: how they were packed.

    Returns:
        [out, in] in the dtype of `scales`. Memory: about one and a half times the result.
    """
    on_cpu = mx.default_device() == mx.cpu
    if not on_cpu or mode != "affine" or bits != 4 or weight.ndim != 2:
        return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    pairs = weight.view(mx.uint8).astype(mx.uint16)
    pairs = (pairs | (pairs << 4)) & mx.array(0x0F0F, mx.uint16)  # 0xba -> 0x0b, 0x0a
    groups = pairs.view(mx.uint8).astype(scales.dtype).reshape(*scales.shape, group_size)
    groups = groups * scales[..., None] + biases[..., None]
    return groups.reshape(weight.shape[0], -1)
