"""Tiled attention: the same as attention, and never tokens x tokens."""

import gc
import re
from io import StringIO
from itertools import product
from math import isqrt

import mlx.core as mx
import pytest
from backends import frees_at_once
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.layers import fused
from mlx_edgelora.layers.attention import TILE_BYTES, Backend, tiled_attention, use_fused

MIB = 2**20
SCALE = 0.3


def normal(shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def plain_attention(q, k, v, sinks=None, *, mask=None, window=None):
    """The definition, with keys and values repeated, in the dtype of the inputs."""
    k, v = (mx.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = SCALE * (q @ k.swapaxes(-1, -2))
    rows, keys = scores.shape[-2:]
    if isinstance(mask, str):
        ago = mx.arange(keys - rows, keys)[:, None] - mx.arange(keys)
        mask = (ago >= 0) & (ago < (window or keys))
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        extra = mx.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, extra], axis=-1)
    return mx.softmax(scores, axis=-1)[..., :keys] @ v


def both(function, arrays, cotangent):
    """Output and gradients."""
    outputs, gradients = mx.vjp(function, arrays, [cotangent])
    mx.eval(outputs, gradients)
    return outputs + gradients


def inputs(batch, kv_heads, group, rows, keys, size, v_size, dtype=mx.float32):
    """Queries, keys and values, and a cotangent."""
    q = normal((batch, kv_heads * group, rows, size), 1, dtype)
    k = normal((batch, kv_heads, keys, size), 2, dtype)
    v = normal((batch, kv_heads, keys, v_size), 3, dtype)
    return [q, k, v], normal((*q.shape[:3], v_size), 4, dtype)


def norm(x):
    return mx.linalg.norm(x.astype(mx.float32).reshape(-1)).item()


def assert_same(got, expected, cotangent, tolerance):
    """Relative to the norm; where it vanishes (one key, say) to a tenth of the cotangent's."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        error = norm(ours.astype(mx.float32) - theirs.astype(mx.float32))
        assert error <= tolerance * max(norm(theirs), norm(cotangent) / 10)


def assert_exact(arrays, cotangent, tile_bytes, tolerance=1e-5, **options):
    got = both(
        lambda q, k, v, *sinks: tiled_attention(
            q,
            k,
            v,
            scale=SCALE,
            sinks=sinks[0] if sinks else None,
            tile_bytes=tile_bytes,
            **options,
        ),
        arrays,
        cotangent,
    )
    expected = both(lambda *x: plain_attention(*x, **options), arrays, cotangent)
    assert_same(got, expected, cotangent, tolerance)


shapes = st.tuples(*[st.integers(1, most) for most in (2, 3, 3, 40, 40, 9, 9)])
tiles = st.integers(1, 6000)  # of one score to all heads at once


@settings(max_examples=30)
@given(shape=shapes, tile_bytes=tiles, sinks=st.booleans())
def test_exact_without_a_mask(shape, tile_bytes, sinks):
    arrays, cotangent = inputs(*shape)
    extra = [2 * normal((arrays[0].shape[1],), 5)] if sinks else []
    assert_exact(arrays + extra, cotangent, tile_bytes)


@settings(max_examples=30)
@given(
    shape=shapes,
    tile_bytes=tiles,
    sinks=st.booleans(),
    window=st.none() | st.integers(1, 50),
)
def test_exact_under_causal_mask_and_window(shape, tile_bytes, sinks, window):
    batch, kv_heads, group, rows, keys, *sizes = shape
    arrays, cotangent = inputs(batch, kv_heads, group, *sorted((rows, keys)), *sizes)
    extra = [2 * normal((arrays[0].shape[1],), 5)] if sinks else []
    assert_exact(arrays + extra, cotangent, tile_bytes, mask="causal", window=window)


@settings(max_examples=30)
@given(
    shape=shapes,
    tile_bytes=tiles,
    sinks=st.booleans(),
    kind=st.sampled_from(["bool", "sparse", "added"]),
    whole=st.tuples(*[st.booleans()] * 4),
    axes=st.integers(2, 4),
)
def test_exact_under_any_array_mask(shape, tile_bytes, sinks, kind, whole, axes):
    """Sparse ones have rows that see nothing; axes of one or left out are broadcast."""
    arrays, cotangent = inputs(*shape)
    full = (*arrays[0].shape[:3], arrays[1].shape[2])
    mask = normal([size if take else 1 for size, take in zip(full, whole, strict=True)][-axes:], 6)
    mask = mask if kind == "added" else mask > (0 if kind == "bool" else 1.5)
    extra = [2 * normal((arrays[0].shape[1],), 5)] if sinks else []
    assert_exact(arrays + extra, cotangent, tile_bytes, mask=mask)


def test_equals_mlx_where_mlx_has_it():
    """Lower-right alignment and the shape of masks are MLX's, not only our reference's."""
    arrays, cotangent = inputs(2, 2, 3, 21, 34, 16, 16)
    masks = ["causal", None, normal((21, 34), 7) > 0, normal((2, 6, 21, 34), 7)]
    for mask, sinks in product(masks, (None, normal((6,), 5))):
        got, expected = (
            both(lambda *x: f(*x, scale=SCALE, mask=mask, sinks=sinks), arrays, cotangent)  # noqa: B023
            for f in (
                lambda *x, **y: tiled_attention(*x, **y, tile_bytes=500),
                mx.fast.scaled_dot_product_attention,
            )
        )
        assert_same(got, expected, cotangent, 1e-5)


@pytest.mark.parametrize("added", [False, True], ids=["bool", "minus infinity"])
def test_rows_that_see_nothing_are_the_mean(added):
    (q, k, v), cotangent = inputs(1, 1, 2, 5, 9, 4, 4)
    mask = normal((5, 9), 7) > 0
    mask[2] = False
    mask[3] = True
    seen = both(
        lambda *x: tiled_attention(
            *x, scale=SCALE, mask=mx.where(mask, 0.0, -mx.inf) if added else mask, tile_bytes=64
        ),
        [q, k, v],
        cotangent,
    )
    assert all(mx.isfinite(x).all().item() for x in seen)
    assert mx.allclose(seen[0][0, :, 2], v[0, 0].mean(0), atol=1e-6).item()
    if not added:  # as in MLX, whose scores do not count there
        assert mx.abs(seen[1][0, :, 2]).max().item() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 6e-3), (mx.float16, 8e-4)])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_half_precision_is_rounded_once(dtype, tolerance, mask):
    """Of the exact result on the same inputs: sums over 300 keys in the dtype would fail."""
    arrays, cotangent = inputs(1, 2, 2, 300, 300, 16, 16, dtype)
    sinks = normal((4,), 5, dtype)
    got = both(
        lambda q, k, v, s: tiled_attention(
            q, k, v, scale=SCALE, mask=mask, sinks=s, tile_bytes=10_000
        ),
        [*arrays, sinks],
        cotangent,
    )
    assert {x.dtype for x in got} == {dtype}
    exact = [x.astype(mx.float32) for x in (*arrays, sinks, cotangent)]
    expected = both(lambda *x: plain_attention(*x, mask=mask), exact[:-1], exact[-1])
    assert_same(got, expected, cotangent, tolerance)


def test_large_logits_do_not_overflow():
    """Scores of several hundred, of which no exponential exists in float32."""
    (q, k, v), cotangent = inputs(1, 1, 1, 20, 20, 8, 8)
    arrays = [mx.abs(q), k + 200, v]
    assert (SCALE * arrays[0] @ arrays[1].swapaxes(-1, -2)).min().item() > 100
    # Their rounding alone is 1e-5 of what the softmax sees.
    assert_exact(arrays, cotangent, 100, 1e-3, mask="causal")


@settings(max_examples=30)
@given(
    shape=shapes,
    tile_bytes=tiles,
    sinks=st.booleans(),
    whole=st.tuples(*[st.booleans()] * 4),
    axes=st.integers(2, 4),
    hidden=st.booleans(),
)
def test_a_floating_mask_has_its_gradient(shape, tile_bytes, sinks, whole, axes, hidden):
    """As rotary scores have that multi-head latent attention adds; broadcast axes are summed."""
    arrays, cotangent = inputs(*shape)
    full = (*arrays[0].shape[:3], arrays[1].shape[2])
    mask = normal([size if take else 1 for size, take in zip(full, whole, strict=True)][-axes:], 6)
    if hidden:  # some scores count for nothing, never all of a row
        mask = mx.where(normal(mask.shape, 8) > 0.5, mx.finfo(mx.float32).min, mask)
        mask[..., 0] = 0.1
    extra = [2 * normal((arrays[0].shape[1],), 5)] if sinks else []
    got, expected = (
        both(f, [*arrays, mask, *extra], cotangent)
        for f in (
            lambda q, k, v, m, s=None: tiled_attention(
                q, k, v, scale=SCALE, mask=m, sinks=s, tile_bytes=tile_bytes
            ),
            lambda q, k, v, m, *s: plain_attention(q, k, v, *s, mask=m),
        )
    )
    assert_same(got, expected, cotangent, 1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_gradient_of_a_mask_has_its_dtype(dtype):
    arrays, cotangent = inputs(1, 2, 2, 30, 30, 8, 8)
    mask = normal((1, 4, 30, 30), 6, dtype)
    function = lambda mask: tiled_attention(*arrays, scale=SCALE, mask=mask, tile_bytes=500)  # noqa: E731
    _, (got,) = mx.vjp(function, [mask], [cotangent])
    expected = mx.vjp(function, [mask.astype(mx.float32)], [cotangent])[1][0]
    assert got.dtype == dtype
    assert norm(got - expected) <= 8e-3 * norm(expected)


def test_a_mask_of_bool_has_no_gradient():
    arrays, cotangent = inputs(1, 1, 2, 5, 5, 4, 4)
    gradient = both(
        lambda q, k, v, mask: tiled_attention(q, k, v, scale=SCALE, mask=mask),
        [*arrays, normal((5, 5), 7) > 0],
        cotangent,
    )[-1]
    assert not gradient.any().item()


def test_in_value_and_grad_and_twice_in_one_graph():
    """Attention over the output of attention, and once more over the same inputs."""
    (q, k, v), weight = inputs(1, 2, 2, 30, 30, 8, 8)

    def loss(attend):
        def compute(q, k, v):
            once = attend(q, k, v)
            return (weight * (attend(once, k, v) + attend(q, v, k))).sum()

        return compute

    def tiled(q, k, v):
        return tiled_attention(q, k, v, scale=SCALE, mask="causal", tile_bytes=900)

    got, expected = (
        mx.value_and_grad(loss(f), argnums=(0, 1, 2))(q, k, v)
        for f in (tiled, lambda *x: plain_attention(*x, mask="causal"))
    )
    assert_same([got[0], *got[1]], [expected[0], *expected[1]], mx.array(0.0), 1e-5)


def step_peak(function, arrays, cotangent):
    """Peak of forward and gradients above inputs, outputs and gradients."""
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = both(function, arrays, cotangent)
    return mx.get_peak_memory() - before - sum(x.nbytes for x in results)


def documented(arrays, tile_bytes):
    """The bound in the module's docstring: ten tiles and a key head's results twice."""
    q, k, v = arrays
    group, sizes = q.shape[1] // k.shape[1], k.shape[3] + v.shape[3]
    rows = 4 * group * isqrt(tile_bytes // (4 * group)) * max(k.shape[3], v.shape[3])
    head = 4 * (group * q.shape[2] * q.shape[3] + k.shape[2] * sizes)
    return 10 * (tile_bytes + rows) + 2 * head


@pytest.fixture(scope="module")
def long():
    """2048 tokens, of which one head's scores are 16 MiB and all 128 MiB."""
    arrays, cotangent = inputs(1, 4, 2, 2048, 2048, 32, 32)
    mx.eval(arrays, cotangent)
    return arrays, cotangent


def tiled_step(tile_bytes=TILE_BYTES, **options):
    return lambda *x: tiled_attention(*x, scale=SCALE, tile_bytes=tile_bytes, **options)


@frees_at_once
@pytest.mark.parametrize("tile_bytes", [MIB // 4, TILE_BYTES])
def test_peak_is_some_tiles_and_a_head(long, memory, tile_bytes):
    arrays, cotangent = long
    peak = step_peak(tiled_step(tile_bytes, mask="causal"), arrays, cotangent)
    assert peak < documented(arrays, tile_bytes)
    assert peak < 16 * MIB  # tokens x tokens of a single head


@frees_at_once
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_output_and_gradients_are_held_once(memory, dtype):
    """With many heads, results held twice would be more than all the tiles."""
    arrays, cotangent = inputs(2, 32, 2, 256, 256, 64, 64, dtype)
    mx.eval(arrays, cotangent)
    peak = step_peak(tiled_step(MIB // 8, mask="causal"), arrays, cotangent)
    assert peak < documented(arrays, MIB // 8)
    assert peak < arrays[0].nbytes / 1.5


@pytest.mark.slow
def test_array_mask_costs_no_copy_of_it(long, memory):
    arrays, cotangent = long
    mask = normal((2048, 2048), 7) > 0
    mx.eval(mask)
    peak = step_peak(tiled_step(mask=mask), arrays, cotangent)
    assert peak < documented(arrays, TILE_BYTES)


def test_mlx_own_holds_tokens_by_tokens(long, memory):
    """What the tests above would measure if nothing was tiled."""
    arrays, cotangent = long
    peak = step_peak(
        lambda *x: mx.fast.scaled_dot_product_attention(*x, scale=SCALE, mask="causal"),
        arrays,
        cotangent,
    )
    assert peak > 128 * MIB > 5 * documented(arrays, TILE_BYTES)


@frees_at_once
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_compiled_is_exact_and_holds_no_more(memory, compiles, dtype):
    """A compiled graph would merge the backward's tiles with the forward's, and keep them."""
    arrays, cotangent = inputs(1, 2, 2, 1024, 1024, 32, 32, dtype)
    mx.eval(arrays, cotangent)

    @mx.compile
    def compiled(*x):
        outputs, gradients = mx.vjp(tiled_step(MIB // 4, mask="causal"), list(x[:3]), [x[3]])
        return outputs + gradients

    mx.eval(compiled(*arrays, cotangent))
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    got = compiled(*arrays, cotangent)
    mx.eval(got)
    peak = mx.get_peak_memory() - before - sum(x.nbytes for x in got)
    assert peak < documented(arrays, MIB // 4)
    expected = both(tiled_step(MIB // 4, mask="causal"), arrays, cotangent)
    assert_same(got, expected, cotangent, 1e-5)


def products(array):
    """How many matrix products its graph has."""
    text = StringIO()
    mx.export_to_dot(text, array)
    return text.getvalue().count("Matmul")


@pytest.mark.parametrize(
    ("options", "tiles"),
    [({}, 36), ({"mask": "causal"}, 21), ({"mask": "causal", "window": 9}, 11)],
)
def test_hidden_tiles_are_not_computed(long, options, tiles):
    """Of 6 x 6 tiles for each of four key heads, with two products each."""
    arrays, _ = long
    assert products(tiled_attention(*arrays, scale=SCALE, **options)) == 2 * 4 * tiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": normal((4, 6, 8))}, "4 axes"),
        ({"k": mx.zeros((1, 2, 0, 8)), "v": mx.zeros((1, 2, 0, 8))}, "none empty"),
        ({"q": normal((1, 3, 6, 8))}, "do not match"),
        ({"q": normal((1, 4, 6, 7))}, "do not match"),
        ({"q": normal((2, 4, 6, 8))}, "do not match"),
        ({"v": normal((1, 2, 5, 8))}, "do not match"),
        ({"k": normal((1, 2, 6, 8), 0, mx.float16)}, "share a float dtype"),
        ({"mask": "lower"}, '"causal", an array or None; got "lower"'),
        ({"mask": "causal", "q": normal((1, 4, 7, 8))}, "no more queries than keys; got 7, 6"),
        ({"mask": mx.ones((5, 6), mx.bool_)}, r"\(5, 6\) does not broadcast to \(1, 4, 6, 6\)"),
        ({"mask": mx.ones((1, 1, 1, 6, 6), mx.bool_)}, "does not broadcast"),
        ({"mask": mx.ones((6, 6), mx.int32)}, "bool or floating; got mlx.core.int32"),
        ({"window": 3}, 'with mask="causal"; got 3'),
        ({"mask": "causal", "window": 0}, "1 or more"),
        ({"sinks": mx.zeros((2,))}, r"each of 4 heads; got \(2,\)"),
        ({"tile_bytes": 0}, "1 byte or more; got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arrays = {"q": normal((1, 4, 6, 8)), "k": normal((1, 2, 6, 8)), "v": normal((1, 2, 6, 8))}
    with pytest.raises(ValueError, match=message):
        tiled_attention(**(arrays | {"scale": SCALE} | change))


METAL = Backend("metal", (0, 32, 4))
CUDA = Backend("cuda", (0, 32, 4), 9)


def choice(
    backend, rows=256, keys=256, size=128, v_size=128, dtype=mx.bfloat16, traced=True, **options
):
    q, k, v = (
        mx.zeros((1, 2, *shape), dtype) for shape in ((rows, size), (keys, size), (keys, v_size))
    )
    return use_fused(q, k, v, backend=backend, traced=traced, **options)


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        (METAL, {}),
        (METAL, {"dtype": mx.float32, "rows": 9, "keys": 9}),
        (METAL, {"size": 256, "v_size": 256}),
        (METAL, {"size": 96, "v_size": 64}),
        (METAL._replace(mlx=(0, 33, 0)), {}),
        (CUDA, {}),
        (CUDA, {"size": 40, "v_size": 8, "dtype": mx.float16}),
    ],
)
def test_fused_where_mlx_has_both_directions(backend, options, mask):
    assert choice(backend, mask=mask, **options) == (
        True,
        f"MLX's fused attention on {backend.name} has this gradient",
    )


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        (Backend("cpu", (0, 32, 4)), {}, "no fused attention gradient on cpu"),
        (METAL._replace(mlx=(0, 32, 3)), {}, "mlx 0.32.3 is before 0.32.4"),
        (METAL, {"mask": mx.zeros((256, 256))}, "array mask"),
        (METAL, {"mask": "causal", "window": 9}, "window"),
        (METAL, {"sinks": mx.zeros((2,))}, "sinks"),
        (METAL, {"size": 100, "v_size": 100}, r"head sizes \(100, 100\)"),
        (METAL, {"size": 64, "v_size": 96}, r"head sizes \(64, 96\)"),
        (METAL, {"rows": 8}, "8 queries"),
        (METAL, {"mask": "causal", "keys": 255}, "256 queries and 255 keys"),
        (CUDA._replace(compute_capability=7), {}, "compute capability 7"),
        (CUDA, {"dtype": mx.float32}, "not 16 bits"),
        (CUDA, {"size": 136, "v_size": 128}, r"head sizes \(136, 128\)"),
        (CUDA, {"v_size": 100}, r"head sizes \(128, 100\)"),
        (CUDA, {"rows": 200}, "200 queries, no multiple of 128"),
        (CUDA, {"sinks": mx.zeros((2,))}, "sinks"),
        (CUDA, {"mask": "causal", "window": 9}, "window"),
        (CUDA, {"mask": "causal", "keys": 128}, "256 queries and 128 keys"),
    ],
)
def test_not_fused_elsewhere_and_why(backend, options, reason):
    fused, why = choice(backend, **options)
    assert not fused
    assert re.search(reason, why), why


# By name: what MLX says of a Mac's GPU, and its macOS.
MACS = {
    "M1": ("applegpu_g13g", (15, 6)),
    "M2": ("applegpu_g14s", (26, 3)),
    "M3": ("applegpu_g15c", (26, 3)),
    "M4": ("applegpu_g16d", (26, 3)),
    "M5": ("applegpu_g17s", (26, 2)),
    "M5, macOS 26.1": ("applegpu_g17s", (26, 1)),
    "A18": ("applegpu_g17p", (26, 2)),
}
LENGTHS = (9, 9), (1000, 1000), (1024, 4096), (2047, 2047), (2048, 2048), (2048, 4096)


@pytest.mark.parametrize("mac", MACS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_without_a_gradient_mlx_makes_scores_of_large_heads_on_metal(mac, dtype):
    """The table of `ScaledDotProductAttention::use_fallback` in MLX 0.32.4."""
    architecture, macos = MACS[mac]
    backend = METAL._replace(architecture=architecture, macos=macos)
    assert backend.has_matrix_unit == (mac == "M5")
    for size in (64, 72, 80, 96, 128, 192, 256):
        for rows, keys in LENGTHS:
            for mask in (None, "causal"):
                arguments = backend, rows, keys, size, size, dtype
                is_fused, why = choice(*arguments, traced=False, mask=mask)
                large = size == 256 and mask == "causal"
                whole = rows >= 2048 and rows == keys and dtype != mx.float32
                expected = size < 192 or (large and (whole or (mac == "M5" and rows >= 1024)))
                assert is_fused == expected, (size, rows, keys, mask)
                assert is_fused or f"without a gradient MLX makes scores of heads of {size}" in why
                assert choice(*arguments, mask=mask)[0]


def test_float32_of_a_matrix_unit_needs_tf32():
    backend = METAL._replace(architecture="applegpu_g17d", macos=(26, 4))
    arguments = {"rows": 1024, "keys": 1024, "size": 256, "v_size": 256, "mask": "causal"}
    for tf32, dtype in ((True, mx.float32), (False, mx.bfloat16)):
        assert choice(backend._replace(tf32=tf32), dtype=dtype, traced=False, **arguments)[0]
    exact = backend._replace(tf32=False)
    assert not choice(exact, dtype=mx.float32, traced=False, **arguments)[0]


def test_cuda_does_not_ask_whether_a_gradient_is_traced():
    assert choice(CUDA, traced=False) == choice(CUDA)


def test_a_mac_says_which_gpu_and_macos_it_has(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "applegpu_g17g"})
    monkeypatch.setattr(fused, "_macos", lambda: (26, 2, 1))
    for value, tf32 in ((None, True), ("1", True), ("0", False)):
        monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
        if value is not None:
            monkeypatch.setenv("MLX_ENABLE_TF32", value)
        here = Backend.here()
        assert here._replace(mlx=()) == ("metal", (), 0, "applegpu_g17g", (26, 2, 1), tf32)
        assert here.has_matrix_unit


def test_cuda_takes_a_mask_of_bool_but_gives_no_gradient_to_a_floating_one():
    assert choice(CUDA, mask=mx.ones((256, 256), mx.bool_))[0]
    assert choice(CUDA, mask=mx.zeros((256, 256))) == (
        False,
        "the fused backward gives no gradient to a floating mask",
    )


def test_backend_is_that_of_the_default_device():
    here = Backend.here()
    assert here.mlx >= (0, 32)
    assert (here.name == "cpu") == (mx.default_device() == mx.cpu)
    if here.name == "cpu":
        arrays, _ = inputs(1, 1, 1, 256, 256, 64, 64)
        assert not use_fused(*arrays, traced=True)[0]
