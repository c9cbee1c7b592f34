"""Squares are gathered while a step runs; at its end they tell the first bad array and the norm."""

import mlx.core as mx
import pytest

from mlx_edgelora.engine.finite import Magnitudes, first_non_finite

BAD = [float("nan"), float("inf"), -float("inf")]


def with_one(value, shape=(3, 5), dtype=mx.float32, place=7):
    array = mx.zeros(shape).reshape(-1)
    array[place] = value
    array = array.reshape(shape).astype(dtype)
    mx.eval(array)
    return array


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_every_kind_of_bad_number_is_found_wherever_it_is(value, dtype):
    for place in (0, 7, 14):
        arrays = {"good": mx.ones((2, 2), dtype), "bad": with_one(value, (3, 5), dtype, place)}
        assert first_non_finite(arrays) == "bad"


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_largest_numbers_are_finite(dtype):
    most = mx.finfo(dtype).max
    arrays = {"a": mx.array([most, -most], dtype), "b": mx.array(0.0, dtype), "c": mx.zeros((0, 4))}
    mx.eval(arrays)
    assert first_non_finite(arrays) is None


def test_the_first_bad_one_is_named_in_the_order_in_which_they_came():
    finite = Magnitudes()
    finite.add({"a": mx.ones(2), "b": mx.ones(3)})
    finite.add({})
    finite.add({"c": mx.ones(1), "d": with_one(BAD[0])})
    finite.add({"e": with_one(BAD[1]), "f": mx.ones(2)})
    assert finite.first_bad() == "d"


def test_what_is_cleared_is_forgotten():
    finite = Magnitudes()
    assert finite.first_bad() is None and finite.norm() is None
    finite.add({"a": with_one(BAD[0])})
    assert finite.first_bad() == "a"
    finite.clear()
    assert finite.first_bad() is None
    finite.add({"b": mx.ones(2)})
    assert finite.first_bad() is None
    finite.add({"b": mx.ones(2), "a": with_one(BAD[2])})
    assert finite.first_bad() == "a"


def test_the_norm_is_that_of_the_last_sums():
    finite = Magnitudes()
    finite.add({"a": mx.full((3, 5), 7.0), "b": mx.array([3.0, 4.0], mx.bfloat16)})
    finite.add({"a": mx.zeros((2, 2)), "c": mx.array([[0.0, 12.0]], mx.float16)})
    assert finite.norm() == pytest.approx(13.0)


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="squares are of float32 there")
def test_squares_of_large_numbers_do_not_overflow():
    finite = Magnitudes()
    finite.add({"a": mx.array([3e30, 4e30])})
    assert finite.first_bad() is None and finite.norm() == pytest.approx(5e30)


def test_a_flag_is_of_the_array_as_it_was():
    """Gradients are added into one buffer, and let go, before the flags are read."""
    finite, gradients = Magnitudes(), {"a": with_one(BAD[0]), "b": mx.ones(2)}
    finite.add(gradients)
    gradients["a"] = gradients["b"] = None
    assert finite.first_bad() == "a"


def test_arrays_that_do_not_lie_densely():
    whole = with_one(BAD[0], (4, 6), place=8)  # row 1, column 2
    parts = {"columns": whole[:, ::3], "transposed": whole.T[3:], "the one": whole.T[2:3, 1:2]}
    mx.eval(parts)
    assert first_non_finite(parts) == "the one"


def test_nothing_of_an_array_is_kept(memory):
    finite, size = Magnitudes(), 2**20
    before = mx.get_active_memory()
    for _ in range(3):
        array = mx.ones((size,))
        mx.eval(array)
        finite.add({"a": array})
        del array
    mx.synchronize()
    assert mx.get_active_memory() - before < size
    assert finite.first_bad() is None
