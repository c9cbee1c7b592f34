"""Products with a frozen packed matrix, and the LoRA layers around them."""

import gc
import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import relative_error
from backends import Holder, exact_reference, frees_at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear
from mlx_lm.tuner.lora import LoRASwitchLinear as MlxLoRASwitchLinear

from mlx_edgelora.blocks.lora_layers import LoRALinear, LoRASwitchLinear
from mlx_edgelora.layers.linear import (
    DequantizedEmbedding,
    DequantizedLinear,
    frozen_matmul,
    plus_product,
)

MODES = [("affine", group, bits) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)]
MODES += [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
MIB = 2**20


def normal(shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def packed(out_dims, in_dims, mode="affine", group_size=32, bits=4):
    settings = {"mode": mode, "group_size": group_size, "bits": bits}
    arrays = mx.quantize(normal((out_dims, in_dims), 1), **settings)
    mx.eval(arrays)
    return arrays, settings


def both(function, x, cotangent):
    (y,), (dx,) = mx.vjp(function, [x], [cotangent])
    mx.eval(y, dx)
    return y, dx


def assert_exact(x, out_dims, tile_bytes, **mode):
    """Forward and gradient against the dequantized matrix, in float64 on the way."""
    arrays, settings = packed(out_dims, x.shape[-1], **mode)
    whole = np.array(mx.dequantize(*arrays, **settings).astype(mx.float32), np.float64)
    cotangent = normal((*x.shape[:-1], out_dims), 2)
    y, dx = both(
        lambda x: frozen_matmul(x, *arrays, tile_bytes=tile_bytes, **settings), x, cotangent
    )
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert relative_error(y, mx.array(np.array(x, np.float64) @ whole.T)) < 1e-5
    assert relative_error(dx, mx.array(np.array(cotangent, np.float64) @ whole)) < 1e-5


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_product_is_exact_for_every_packing(mode, group_size, bits):
    rows = 7 * 256 * 4  # tiles of 7 rows: 52 is not a multiple of it
    assert_exact(normal((2, 3, 256)), 52, rows, mode=mode, group_size=group_size, bits=bits)


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    groups=st.integers(1, 5),
    out_dims=st.integers(1, 70),
    tile_bytes=st.integers(1, 40_000),
)
def test_product_is_exact_for_every_shape_and_tile(leading, groups, out_dims, tile_bytes):
    assert_exact(normal((*leading, 32 * groups)), out_dims, tile_bytes)


def test_frozen_arrays_get_no_gradient():
    arrays, settings = packed(64, 64)
    _, gradients = mx.vjp(
        lambda x, scales, biases: frozen_matmul(x, arrays[0], scales, biases, **settings),
        [normal((3, 64)), *arrays[1:]],
        [normal((3, 64), 2)],
    )
    assert mx.abs(gradients[0]).max().item() > 0
    assert [mx.abs(g).max().item() for g in gradients[1:]] == [0, 0]


def step_peak(function, x, cotangent):
    """Peak of forward and gradient above what is there before, once warm."""
    for _ in range(2):
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        both(function, x, cotangent)
    return mx.get_peak_memory() - before


@pytest.fixture(scope="module")
def large():
    """A layer of which a dequantized copy is 64 MiB."""
    arrays, settings = packed(8192, 2048, group_size=64)
    x, cotangent = normal((8, 2048)), normal((8, 8192), 2)
    mx.eval(x, cotangent)
    return arrays, settings, x, cotangent


@frees_at_once
def test_no_dequantized_copy_ever_exists(large, memory):
    arrays, settings, x, cotangent = large
    peak = step_peak(lambda x: frozen_matmul(x, *arrays, **settings), x, cotangent)
    assert peak < 64 * MIB / 2


def test_the_obvious_product_holds_a_copy(large, memory):
    arrays, settings, x, cotangent = large
    peak = step_peak(lambda x: x @ mx.dequantize(*arrays, **settings).T, x, cotangent)
    assert peak > 64 * MIB


@frees_at_once
def test_compiled_product_is_exact_and_holds_no_copy(large, memory, compiles):
    arrays, settings, x, cotangent = large

    @mx.compile
    def compiled(x, cotangent, *arrays):
        y, dx = mx.vjp(lambda x: frozen_matmul(x, *arrays, **settings), [x], [cotangent])
        return y[0], dx[0]

    expected = both(lambda x: x @ mx.dequantize(*arrays, **settings).T, x, cotangent)
    mx.eval(compiled(x, cotangent, *arrays))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    got = compiled(x, cotangent, *arrays)
    mx.eval(got)
    assert mx.get_peak_memory() - before < 64 * MIB / 2
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_dequantized_linear_and_embedding_equal_mlx(bias):
    linear = nn.Linear(64, 96, bias=bias).to_quantized(32, 4)
    embedding = nn.Embedding(96, 64).to_quantized(32, 4)
    if bias:
        linear.bias = normal((96,), 4)
    x, cotangent = normal((2, 5, 64)), normal((2, 5, 96), 2)
    theirs = both(linear, x, cotangent), both(embedding.as_linear, x, cotangent)
    linear.__class__, embedding.__class__ = DequantizedLinear, DequantizedEmbedding
    for got, expected in zip(
        (both(linear, x, cotangent), both(embedding.as_linear, x, cotangent)), theirs, strict=True
    ):
        assert relative_error(got[0], expected[0]) < 1e-5
        assert relative_error(got[1], expected[1]) < 1e-5


def adapted(base, lora_class):
    """A layer of mlx-lm's own with random adapters, frozen but for them."""
    layer = lora_class.from_base(base, r=4, scale=3.0, dropout=0.0)
    layer.lora_b = 0.3 * normal(layer.lora_b.shape, 5)
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return layer


def gradients_of(layer, x, *args):
    """The output, and the gradients of x and the adapters."""
    parameters = layer.trainable_parameters()

    def loss(parameters, x):
        layer.update(parameters)
        y = layer(x, *args)
        weight = normal((y.size,), 2).reshape(y.shape).astype(y.dtype)
        return (y * weight).sum(), y

    (_, y), (adapters, dx) = mx.value_and_grad(loss, argnums=(0, 1))(parameters, x)
    layer.update(parameters)
    mx.eval(y, dx, adapters)
    return [y, dx] + [value for _, value in tree_flatten(adapters)]


@pytest.mark.parametrize("leading", [(), (5,), (0,), (2, 5), (2, 0), (3, 1, 5)])
def test_a_product_is_added_exactly(leading):
    """Forward and gradients are those of a product and a sum, of any number of axes."""
    arrays = [normal((*leading, 7)), normal((*leading, 3), 1), normal((3, 7), 2)]
    cotangent = normal((*leading, 7), 3)
    expected = mx.vjp(lambda y, x, matrix: y + x @ matrix, arrays, [cotangent])
    got = mx.vjp(plus_product, arrays, [cotangent])
    for ours, theirs in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        assert ours.shape == theirs.shape
        assert not ours.size or relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtypes", [(mx.float32, mx.bfloat16), (mx.bfloat16, mx.float32)])
def test_a_product_of_another_dtype_is_added_as_it_is(dtypes):
    y, x, matrix = normal((2, 5, 7)), normal((2, 5, 3), 1), normal((3, 7), 2)
    y, x, matrix = y.astype(dtypes[0]), x.astype(dtypes[1]), matrix.astype(dtypes[1])
    assert mx.array_equal(plus_product(y, x, matrix), y + (x @ matrix).astype(y.dtype)).item()


@frees_at_once
def test_what_is_added_takes_the_memory_of_the_sum(memory):
    y, x, matrix = normal((2, 512, 2048)), normal((2, 512, 8), 1), normal((8, 2048), 2)  # 8 MiB
    mx.eval(y, x, matrix)
    peaks = []
    for add in (plus_product, lambda y, x, matrix: y + x @ matrix):
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(add(2 * y, x, matrix))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 9 * MIB and peaks[1] > 15 * MIB, peaks


@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
def test_lora_linear_equals_mlx_lm(quantized, leading):
    base = nn.Linear(64, 96)  # with a bias
    base = base.to_quantized(32, 4) if quantized else base
    layer, x = adapted(base, MlxLoRALinear), normal((*leading, 64))
    expected = gradients_of(layer, x)
    layer.__class__ = LoRALinear
    got = gradients_of(layer, x)
    assert len(got) == 4  # output, x, lora_a, lora_b
    for ours, theirs in zip(got, expected, strict=True):
        assert mx.abs(theirs).max().item() > 0
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("sorted_indices", [False, True])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
def test_lora_switch_linear_equals_mlx_lm(quantized, sorted_indices):
    base = SwitchLinear(64, 32, num_experts=3)
    base.bias = normal((3, 32), 6)
    base = base.to_quantized(32, 4) if quantized else base
    layer, x = adapted(base, MlxLoRASwitchLinear), normal((6, 1, 64))
    indices = mx.array([0, 0, 1, 2, 2, 2] if sorted_indices else [2, 0, 1, 0, 2, 1])
    expected = gradients_of(layer, x, indices, sorted_indices)
    layer.__class__ = LoRASwitchLinear
    got = gradients_of(layer, x, indices, sorted_indices)
    assert len(got) == 4
    assert isinstance(layer.linear, QuantizedSwitchLinear) == quantized
    for ours, theirs in zip(got, expected, strict=True):
        assert mx.abs(theirs).max().item() > 0
        assert relative_error(ours, theirs) < 1e-6


def test_bfloat16_activations_get_no_float32_copies(memory):
    base = nn.Linear(128, 128, bias=False)
    base.set_dtype(mx.bfloat16)
    layer, x = adapted(base, MlxLoRALinear), normal((4096, 128)).astype(mx.bfloat16)  # 1 MiB
    mx.eval(layer.parameters(), x)
    peaks = {}
    for kind in (MlxLoRALinear, LoRALinear):
        layer.__class__ = kind
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        y, dx, *adapters = gradients_of(layer, x)
        peaks[kind] = mx.get_peak_memory() - before
        assert {array.dtype for array in adapters} == {mx.float32}
        del dx, adapters
    assert y.dtype == mx.bfloat16  # mlx-lm's too
    assert peaks[LoRALinear] < peaks[MlxLoRALinear] - 2 * MIB, peaks


def test_experts_have_ranks_that_cuda_can_read(monkeypatch):
    base = SwitchLinear(64, 32, num_experts=3).to_quantized(32, 4)
    layer, x = adapted(base, MlxLoRASwitchLinear), normal((6, 1, 64))
    indices = mx.array([0, 0, 0, 1, 2, 2])
    expected = gradients_of(layer, x, indices, True)
    layer.__class__ = LoRASwitchLinear
    asked, gather_mm = [], mx.gather_mm

    def recording(a, b, **options):
        asked.append((a.shape[-1], b.shape[-1]))
        return gather_mm(a, b, **options)

    monkeypatch.setattr(mx, "gather_mm", recording)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    for ours, theirs in zip(gradients_of(layer, x, indices, True), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert asked == [(64, 8), (8, 32)]


def test_experts_of_few_tokens_have_a_gradient_with_cuda(monkeypatch):
    base = SwitchLinear(64, 96, num_experts=3).to_quantized(32, 4)
    layer = adapted(base, MlxLoRASwitchLinear)
    # As in mlx-lm's layers: one token for the experts that it picks.
    x, indices = normal((2, 5, 1, 1, 64)), mx.random.randint(0, 3, (2, 5, 2))
    assert indices.size < 64 and len(set(indices.flatten().tolist())) == 3
    expected = gradients_of(exact_reference(Holder(layer)).layer, x, indices)
    layer.__class__ = LoRASwitchLinear
    monkeypatch.setattr(mx, "gather_mm", None)  # its gradient cannot be started there
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    for ours, theirs in zip(gradients_of(layer, x, indices), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_packed_bfloat16_experts_can_be_adapted():
    """On a CPU gather_mm has float32 only, while the packed product takes any dtype."""
    base = SwitchLinear(64, 32, 2, bias=False).to_quantized(32, 4)
    base.set_dtype(mx.bfloat16)
    layer, x = adapted(base, MlxLoRASwitchLinear), normal((4, 1, 64))
    layer.__class__ = LoRASwitchLinear
    indices = mx.array([0, 0, 1, 1])
    y, dx, *adapters = gradients_of(layer, x.astype(mx.bfloat16), indices)
    assert [y.dtype, dx.dtype] == [mx.bfloat16] * 2
    assert {array.dtype for array in adapters} == {mx.float32}
    base.set_dtype(mx.float32)
    for ours, exact in zip([y, dx, *adapters], gradients_of(layer, x, indices), strict=True):
        assert relative_error(ours, exact) < 0.02
