"""The gated delta rule in chunks: values and all gradients of mlx-lm's loop, and less memory."""

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta as module
from mlx_lm.models.gated_delta import gated_delta_ops, gated_delta_update

from mlx_edgelora.layers.gated_delta import gated_delta

NAMES = ("q", "k", "v", "g", "beta", "state")


def unit(shape, key):
    x = mx.random.normal(shape, key=key)
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def inputs(shape, heads=(2, 4), sizes=(8, 6), channels=False, rate=1.0, seed=0):
    """q, k, v, g, beta, state for (B, T), (Hk, Hv), (Dk, Dv); decays down to exp(-rate)."""
    keys = mx.random.split(mx.random.key(seed), 6)
    q, k = (unit((*shape, heads[0], sizes[0]), key) for key in keys[:2])
    v = mx.random.normal((*shape, heads[1], sizes[1]), key=keys[2])
    size = (*shape, heads[1], sizes[0]) if channels else (*shape, heads[1])
    g = mx.exp(-rate * mx.random.uniform(shape=size, key=keys[3]))
    beta = mx.random.uniform(shape=(*shape, heads[1]), key=keys[4])
    state = mx.random.normal((shape[0], heads[1], sizes[1], sizes[0]), key=keys[5])
    return [q, k, v, g, beta, state]


def results(function, arrays, mask=None):
    """y, the last state, and the gradients of all arrays for cotangents of both."""
    keys = mx.random.split(mx.random.key(9), 2)

    def pair(*arrays):
        return list(function(*arrays, mask))

    shapes = [value.shape for value in pair(*arrays)]
    wanted = [mx.random.normal(s, key=k) for s, k in zip(shapes, keys, strict=True)]
    return [*mx.vjp(pair, arrays, wanted)[0], *mx.vjp(pair, arrays, wanted)[1]]


def assert_same(arrays, mask=None, chunk=None, tolerance=1e-5):
    expected = results(gated_delta_ops, arrays, mask)
    got = results(lambda *a: gated_delta(*a, chunk=chunk), arrays, mask)
    for name, a, b in zip(("y", "last state", *NAMES), got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        off = mx.linalg.norm((a - b).astype(mx.float32)).item()
        size = mx.linalg.norm(b.astype(mx.float32)).item()
        assert off <= tolerance * max(size, 1e-6), f"{name}: {off:.1e} of {size:.1e}"


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tokens", "chunk"), [(1, None), (7, 8), (23, 4), (37, 7), (64, 16), (130, None)]
)
def test_is_the_loop(tokens, chunk, masked, channels):
    arrays = inputs((2, tokens), channels=channels, seed=tokens)
    mask = mx.random.uniform(shape=(2, tokens), key=mx.random.key(5)) > 0.3 if masked else None
    assert_same(arrays, mask, chunk)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (3, 3)])
def test_heads_share_keys(heads, channels):
    assert_same(inputs((1, 20), heads, (5, 3), channels), chunk=8)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("rate", [1e-3, 30.0, 1000.0])
def test_decays_neither_overflow_nor_cancel(rate, channels):
    arrays = inputs((1, 70), channels=channels, rate=rate)
    arrays[3] = arrays[3].at[:, 1::5].multiply(0.0).at[:, 1::5].add(0.999)  # weak among strong ones
    arrays[3] = arrays[3].at[:, 33].multiply(0.0)
    assert_same(arrays)


@pytest.mark.parametrize("channels", [False, True])
def test_repeated_keys_are_no_problem(channels):
    """Powers of the matrix of keys would be binomials of 63."""
    arrays = inputs((1, 100), channels=channels, rate=1e-3)
    arrays[1] = mx.broadcast_to(arrays[1][:, :1], arrays[1].shape)
    arrays[4] = mx.ones_like(arrays[4])
    assert_same(arrays)


def test_padding_leaves_the_state_alone():
    q, k, v, g, beta, state = inputs((2, 30))
    mask = mx.arange(30) < mx.array([30, 11])[:, None]
    _, last = gated_delta(q, k, v, g, beta, state, mask, chunk=8)
    _, short = gated_delta(*(a[1:, :11] for a in (q, k, v, g, beta)), state[1:], chunk=8)
    assert mx.allclose(last[1:], short, atol=1e-5)


def test_states_go_from_call_to_call():
    arrays = inputs((1, 50))

    def in_two(q, k, v, g, beta, state, mask):
        ys = []
        for tokens in (slice(0, 21), slice(21, 50)):
            part = [a[:, tokens] for a in (q, k, v, g, beta)]
            y, state = gated_delta(*part, state, chunk=8)
            ys.append(y)
        return mx.concatenate(ys, axis=1), state

    pairs = zip(results(in_two, arrays), results(gated_delta_ops, arrays), strict=True)
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_low_precision_in_and_out(dtype):
    arrays = inputs((1, 40))
    arrays = [a if i in (3, 5) else a.astype(dtype) for i, a in enumerate(arrays)]
    assert_same(arrays, tolerance=2e-2)


def test_compiled_is_the_same():
    arrays = inputs((1, 40))

    def gradients(*arrays):
        return results(lambda *a: gated_delta(*a, chunk=16), list(arrays))

    pairs = zip(gradients(*arrays), mx.compile(gradients)(*arrays), strict=True)
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_without_a_state_as_mlx_lm():
    arrays = inputs((1, 20))[:5]
    for a, b in zip(gated_delta(*arrays), gated_delta_ops(*arrays), strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"q": a["q"][0]}, "4 axes"),
        (lambda a: a | {"v": a["v"][:, :, :3]}, "heads that divide"),
        (lambda a: a | {"k": a["k"][:, 1:]}, "do not match"),
        (lambda a: a | {"g": a["g"][..., :1]}, "do not match"),
        (lambda a: a | {"beta": a["beta"][:1]}, "do not match"),
        (lambda a: a | {"state": a["state"][:, :1]}, "A state is"),
        (lambda a: a | {"mask": mx.ones((2, 6))}, "A mask is bool"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    arrays = dict(zip(NAMES, inputs((2, 6)), strict=True))
    with pytest.raises(ValueError, match=message):
        gated_delta(**change(arrays))


def peak(tokens, function):
    arrays = inputs((1, tokens), (2, 4), (64, 64))
    mx.eval(arrays)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.vjp(lambda *a: list(function(*a)), arrays, list(function(*arrays)))[1])
    return mx.get_peak_memory() - before


def test_no_state_of_every_token_is_kept():
    state = 4 * 4 * 64 * 64
    assert peak(256, gated_delta_ops) > 2 * 256 * state
    # What is kept per token grows by its gradients and the square root of its states alone.
    grown = peak(2048, gated_delta) - peak(1024, gated_delta)
    per_token = 4 * (4 * 2 * 64 * 2 + 3 * 4 * 64 + 2 * 8)
    assert grown < 1024 * per_token + 8 * state


def test_gradients_reach_what_makes_decays(monkeypatch):
    """Through mlx-lm's own gates."""
    q, k, v, a, b, state = inputs((1, 33))
    extra = [mx.array([0.0, 1.0, 2.0, 2.7]), mx.ones(4)]

    def loss(update):
        def of(a, b, *extra):
            y, last = update(q, k, v, a, b, *extra, state)
            return (y * y).sum() + last.sum()

        return mx.grad(of, argnums=[0, 1, 2, 3])(a, b, *extra)

    plain = loss(gated_delta_update)
    monkeypatch.setattr(module, "gated_delta_ops", gated_delta)
    for got, expected in zip(loss(gated_delta_update), plain, strict=True):
        assert mx.allclose(got, expected, rtol=1e-4, atol=1e-5)
