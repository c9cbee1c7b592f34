"""The recurrence of Mamba 2 in chunks: values and all gradients of mlx-lm's, and less memory."""

import mlx.core as mx
import pytest
from mlx_lm.models import ssm

from mlx_edgelora.blocks.state_space import chunked_state_space
from mlx_edgelora.layers.state_space import state_space

NAMES = ("x", "A_log", "B", "C", "D", "dt", "dt_bias", "state")
original = ssm.ssm_attn


def inputs(rows, tokens, heads=4, groups=2, sizes=(6, 5), seed=0):
    """The arrays of `ssm_attn`, with decays from almost one to almost none."""
    keys = mx.random.split(mx.random.key(seed), len(NAMES))
    shapes = [
        (rows, tokens, heads, sizes[0]),
        (heads,),
        (rows, tokens, groups, sizes[1]),
        (rows, tokens, groups, sizes[1]),
        (heads,),
        (rows, tokens, heads),
        (heads,),
        (rows, heads, *sizes),
    ]
    made = [mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)]
    made[1] = mx.linspace(-4, 4, heads)
    return made


def results(function, arrays):
    """y, the last state, and the gradients of all arrays for cotangents of both."""

    def pair(*arrays):
        return list(function(*arrays))

    shapes = [value.shape for value in pair(*arrays)]
    wanted = [mx.random.normal(s, key=mx.random.key(9)) for s in shapes]
    values, gradients = mx.vjp(pair, arrays, wanted)
    return [*values, *gradients]


def chunked(*arrays, **named):
    with chunked_state_space():
        assert ssm.ssm_attn is not original
        return ssm.ssm_attn(*arrays, **named)


def assert_same(got, expected, tolerance=1e-5):
    for name, a, b in zip(("y", "last", *NAMES), got, expected, strict=False):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        off, size = (mx.linalg.norm(v.astype(mx.float32)).item() for v in (a - b, b))
        assert off <= tolerance * max(size, 1e-6), f"{name}: {off:.1e} of {size:.1e}"


@pytest.mark.parametrize(("tokens", "groups"), [(1, 2), (23, 1), (130, 4)])
def test_is_mlx_lms(tokens, groups):
    arrays = inputs(2, tokens, groups=groups, seed=tokens)
    assert_same(results(chunked, arrays), results(original, arrays))
    assert_same(results(chunked, arrays[:7]), results(original, arrays[:7]))


def test_states_go_from_call_to_call():
    arrays = inputs(1, 90)

    def in_two(x, a, b, c, d, dt, bias, state):
        ys = []
        for part in (slice(0, 37), slice(37, 90)):
            own = [array[:, part] for array in (x, b, c, dt)]
            y, state = chunked(own[0], a, own[1], own[2], d, own[3], bias, state)
            ys.append(y)
        return mx.concatenate(ys, axis=1), state

    assert_same(results(in_two, arrays), results(original, arrays))


def test_low_precision_in_and_out():
    arrays = [a.astype(mx.bfloat16) for a in inputs(1, 70)[:7]]
    assert_same(results(chunked, arrays), results(original, arrays), tolerance=3e-2)


def test_padding_is_left_to_mlx_lm():
    arrays, mask = inputs(2, 9), mx.arange(9) < mx.array([9, 4])[:, None]
    for a, b in zip(chunked(*arrays, mask=mask), original(*arrays, mask=mask), strict=True):
        assert mx.array_equal(a, b)


def test_shapes_that_do_not_fit():
    x, _, keys, queries, _, steps, _, state = inputs(1, 9)
    with pytest.raises(ValueError, match="do not match"):
        state_space(x, steps[:, 1:], keys, queries)
    with pytest.raises(ValueError, match=r"A state is \(1, 4, 6, 5\)"):
        state_space(x, -mx.abs(steps), keys, queries, state[:, 1:])


def test_memory_does_not_grow_with_the_square_of_a_tile():
    arrays = inputs(1, 256, heads=32, groups=1, sizes=(32, 32))

    def peak(function):
        mx.eval(arrays)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(results(function, arrays))
        return mx.get_peak_memory() - before

    assert peak(chunked) < peak(original) / 3
