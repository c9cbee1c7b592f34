"""The exact loss against float64, its gradients against autodiff, and what it holds in memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import relative_error
from backends import frees_at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import cases, value_and_grad
from loss_references import cross_entropy, terms
from pairwise import pairwise

from mlx_edgelora.losses.exact import CrossEntropy, tile_shape
from mlx_edgelora.losses.head import Adapter, MatrixHead, Tile

MIB = 2**20


def check(case, loss):
    hidden, weight, labels = case
    expected, error = cross_entropy(
        (hidden @ weight.T).astype(np.float64), labels, loss.label_smoothing
    )
    head = MatrixHead(mx.array(weight, mx.float32))
    got, gradient = value_and_grad(loss, mx.array(hidden, mx.float32), head, mx.array(labels))
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    # Of the terms, not of their sum: with equal logits it is zero, and thirds do not add to it.
    missed = np.linalg.norm(np.array(gradient, np.float64) - error @ weight)
    assert missed <= 1e-5 * np.linalg.norm(terms(error, labels) @ np.abs(weight))


# From one row and one token per tile up to everything in one.
budgets = st.integers(1, 20_000)


@settings(max_examples=80, deadline=None)
@given(case=cases(2), budget=budgets, smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_loss_and_gradient_are_exact(case, budget, smoothing):
    check(case, CrossEntropy(budget, smoothing))


@settings(max_examples=60, deadline=None)
@given(case=cases(45), budget=budgets)  # logits up to 5 * 45 * 45 = 10,125
def test_huge_logits(case, budget):
    check(case, CrossEntropy(budget))


def test_one_token_a_vocabulary_below_a_tile_and_equal_labels():
    rng = np.random.RandomState(0)
    hidden, weight = rng.randint(-2, 3, (6, 4)), rng.randint(-2, 3, (3, 4))
    check((hidden[:1], weight, np.array([2])), CrossEntropy())
    check((hidden, weight, np.ones(6, int)), CrossEntropy())
    check((hidden, weight[:1], np.zeros(6, int)), CrossEntropy())


def test_digits_of_the_loss_survive_a_large_maximum():
    """Two equal logits of 10,000 cost log 2, of which float32 at 10,000 keeps three digits."""
    hidden, weight = mx.ones((1, 1)), mx.array([[10_000.0], [10_000.0], [-10_000.0]])
    loss, gradient = value_and_grad(CrossEntropy(12), hidden, MatrixHead(weight), mx.array([1]))
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)
    assert abs(gradient.item()) < 1e-3  # 10,000 (1/2 + 1/2 - 1)


def test_realistic_logits_at_a_real_width():
    """Random floats, 3,072 wide: rounding of the products is part of it."""
    hidden, weight = mx.random.normal((33, 3072)), 0.02 * mx.random.normal((2003, 3072))
    labels = mx.random.randint(0, 2003, (33,))
    logits = np.array(hidden, np.float64) @ np.array(weight, np.float64).T
    expected, error = cross_entropy(logits, np.array(labels))
    head = MatrixHead(weight)
    loss, gradient = value_and_grad(CrossEntropy(2 * MIB), hidden, head, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert relative_error(gradient, mx.array(error @ np.array(weight, np.float64))) < 1e-5


def test_labels_in_every_tile():
    """Each label alone, so that a label lost at a tile's edge is seen."""
    hidden, weight = mx.random.normal((1, 4)), mx.random.normal((10, 4))
    logits = np.array(hidden @ weight.T, np.float64)
    for label in range(10):
        loss, _ = CrossEntropy(144).value(hidden, MatrixHead(weight), mx.array([label]))
        expected, _ = cross_entropy(logits, np.array([label]))
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def grad_of(function, places):
    """`mx.value_and_grad` that gives a list for one place too."""

    def run(*args):
        value, gradients = mx.value_and_grad(function, places)(*args)
        return value, [gradients] if len(places) == 1 else list(gradients)

    return run


GAIN = mx.random.normal((8,), key=mx.random.key(5))
AROUND = {
    "nothing": {},
    "norm": {"final_norm": lambda x: mx.fast.rms_norm(x, GAIN, 1e-5)},
    "capped": {"logits_transform": lambda products: 5 * mx.tanh(products / 5)},
    "scaled": {"logits_transform": lambda products: products / 8.0},
    "all": {
        "final_norm": lambda x: mx.fast.rms_norm(x, GAIN, 1e-5),
        "logits_transform": lambda products: 3 * mx.tanh(0.5 * products / 3),
    },
}


BUDGETS, SMOOTHINGS = [1, 1500, 10**6], [0.0, 0.2]


@pytest.mark.parametrize(
    ("around", "adapted", "smoothing", "budget"),
    pairwise(AROUND, [False, True], SMOOTHINGS, BUDGETS),
)
def test_gradients_of_all_that_is_trained(around, adapted, smoothing, budget):
    """Against MLX's autodiff of the whole logits, adapters with a B that is not zero included."""
    keys = iter(mx.random.split(mx.random.key(1), 6))
    hidden = mx.random.normal((13, 8), key=next(keys))
    weight, bias = (
        mx.random.normal((21, 8), key=next(keys)),
        mx.random.normal((21,), key=next(keys)),
    )
    down, up = mx.random.normal((3, 8), key=next(keys)), mx.random.normal((21, 3), key=next(keys))
    labels = mx.array([0, 20, 7, 7, 13, 1, 2, 3, 4, 5, 19, 20, 0])
    names = AROUND[around]
    final_norm, logits_transform = (
        names.get(n, lambda x: x) for n in ("final_norm", "logits_transform")
    )
    loss = CrossEntropy(budget, smoothing)

    def whole(hidden, *trained):
        matrix = weight + 0.7 * trained[1] @ trained[0] if trained else weight
        logits = logits_transform(final_norm(hidden) @ matrix.T + bias)
        return nn.losses.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="mean")

    def head(*trained):
        adapter = Adapter(*trained, 0.7) if trained else None
        return MatrixHead(weight, bias, **names, adapter=adapter)

    trained = [down, up] if adapted else []
    places = tuple(range(1 + len(trained)))
    expected_loss, expected = grad_of(whole, places)(hidden, *trained)
    (value, _), gradients = loss.value_and_grad(hidden, head(*trained), labels)
    again, inside = grad_of(
        lambda hidden, *trained: loss(hidden, head(*trained), labels)[0], places
    )(hidden, *trained)
    for number in (value, again, loss.value(hidden, head(*trained), labels)[0]):
        assert number.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert len(gradients.arrays()) == len(expected)
    for got, also, reference in zip(gradients.arrays(), inside, expected, strict=True):
        assert relative_error(got, reference) < 1e-5
        assert relative_error(also, reference) < 1e-5


WEIGHTS = {
    "mean": [1 / 13] * 13,
    "some zero": [0.5, 0, 0.25, 2.0, 0, 0, 1.5, 0.125, 3.0, 0, 0.75, 1.0, 0],
    "one token": [0] * 6 + [0.7] + [0] * 6,
    "uneven": [0.1 + i for i in range(13)],
}


@pytest.mark.parametrize(
    ("weighting", "around", "adapted", "smoothing", "budget"),
    pairwise(WEIGHTS, AROUND, [False, True], SMOOTHINGS, BUDGETS),
)
def test_a_weighted_sum(weighting, around, adapted, smoothing, budget):
    """Value and all gradients, in a graph and not, against MLX's autodiff of the whole logits."""
    keys = iter(mx.random.split(mx.random.key(2), 6))
    hidden, weight = (mx.random.normal((n, 8), key=next(keys)) for n in (13, 21))
    bias = mx.random.normal((21,), key=next(keys))
    down, up = mx.random.normal((3, 8), key=next(keys)), mx.random.normal((21, 3), key=next(keys))
    labels = mx.array([0, 20, 7, 7, 13, 1, 2, 3, 4, 5, 19, 20, 0])
    weights, names = mx.array(WEIGHTS[weighting], mx.float32), AROUND[around]
    final_norm, logits_transform = (
        names.get(n, lambda x: x) for n in ("final_norm", "logits_transform")
    )

    def whole(hidden, *trained):
        matrix = weight + 0.7 * trained[1] @ trained[0] if trained else weight
        logits = logits_transform(final_norm(hidden) @ matrix.T + bias)
        losses = nn.losses.cross_entropy(logits, labels, label_smoothing=smoothing)
        return (losses * weights).sum()

    def head(*trained):
        adapter = Adapter(*trained, 0.7) if trained else None
        return MatrixHead(weight, bias, **names, adapter=adapter)

    def tiled(hidden, *trained):
        return loss.graph(hidden, head(*trained), labels, weights)

    loss, trained = CrossEntropy(budget, smoothing), [down, up] if adapted else []
    places = tuple(range(1 + len(trained)))
    expected_loss, expected = grad_of(whole, places)(hidden, *trained)
    (value, count), found = loss.value_and_grad(hidden, head(*trained), labels, weights)
    assert count == 13
    nothing = [i for i, number in enumerate(WEIGHTS[weighting]) if number == 0]
    for got, gradients in (grad_of(tiled, places)(hidden, *trained), (value, found.arrays())):
        assert (got.shape, got.dtype) == ((), mx.float32)
        assert got.item() == pytest.approx(expected_loss.item(), rel=2e-6)
        assert len(gradients) == len(expected)
        for mine, reference in zip(gradients, expected, strict=True):
            assert relative_error(mine, reference) < 1e-5
        assert not any(gradients[0][i].any().item() for i in nothing)


def test_equal_weights_in_a_graph_are_the_mean():
    hidden, head = mx.random.normal((5, 4)), MatrixHead(mx.random.normal((9, 4)))
    labels, loss = mx.arange(5), CrossEntropy(100)
    functions = [
        lambda h: loss.graph(h, head, labels),
        lambda h: loss.graph(h, head, labels, mx.full((5,), 0.2)),
        lambda h: loss(h, head, labels)[0],
    ]
    (mean, slope), *others = [mx.value_and_grad(function)(hidden) for function in functions]
    for value, gradient in others:
        assert value.item() == pytest.approx(mean.item(), rel=1e-6)
        assert relative_error(gradient, slope) < 1e-6


def test_compiled_labels_and_weights_are_arguments(compiles):
    """As many tokens with other labels: what was compiled for the first must not serve."""
    head, loss, traced = MatrixHead(mx.random.normal((9, 4))), CrossEntropy(10**4), []

    def function(hidden, labels, weights):
        traced.append(1)
        return mx.value_and_grad(lambda h: loss.graph(h, head, labels, weights))(hidden)

    compiled = mx.compile(function)
    for seed in range(3):
        keys = mx.random.split(mx.random.key(seed), 3)
        arguments = (
            mx.random.normal((5, 4), key=keys[0]),
            mx.random.randint(0, 9, (5,), key=keys[1]),
            mx.random.uniform(shape=(5,), key=keys[2]),
        )
        value, gradient = compiled(*arguments)
        assert len(traced) == 1 + seed
        expected, slope = function(*arguments)
        assert value.item() == pytest.approx(expected.item(), rel=2e-6)
        assert relative_error(gradient, slope) < 1e-5


def test_a_loss_inside_a_larger_function():
    """The cotangent is not always one."""
    hidden, weight, labels = mx.random.normal((5, 4)), mx.random.normal((9, 4)), mx.arange(5)
    square = mx.grad(lambda h: CrossEntropy()(mx.sin(h), MatrixHead(weight), labels)[0] ** 2)
    plain = mx.grad(
        lambda h: nn.losses.cross_entropy(mx.sin(h) @ weight.T, labels, reduction="mean") ** 2
    )
    assert relative_error(square(hidden), plain(hidden)) < 1e-5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sums_are_float32_with_half_inputs(dtype):
    """Rounded logits, or a rounded running sum, would miss by more than a hundred times."""
    hidden, weight = mx.random.normal((6, 64)).astype(dtype), mx.random.normal((501, 64))
    labels, head = mx.array([0, 20, 7, 7, 13, 500]), MatrixHead(weight.astype(dtype))
    numbers = [np.array(a.astype(mx.float32), np.float64) for a in (hidden, weight.astype(dtype))]
    expected, error = cross_entropy(numbers[0] @ numbers[1].T, np.array(labels))
    loss, gradient = value_and_grad(CrossEntropy(4000), hidden, head, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.dtype == dtype
    rounded = mx.array(error @ numbers[1]).astype(dtype)
    assert relative_error(gradient.astype(mx.float32), rounded.astype(mx.float32)) < 2e-3


def test_a_tail_row_stands_for_many_tokens():
    hidden, weight, row = (mx.random.normal((n, 4)) for n in (5, 9, 1))
    labels, head = mx.arange(5), MatrixHead(weight)
    head.tail = lambda seen: Tile(row + 0 * seen.weight, offset=float(np.log(7)))

    def whole(hidden):
        logits = hidden @ mx.concatenate([weight, *[row] * 7]).T
        return nn.losses.cross_entropy(logits, labels, reduction="mean")

    expected_loss, expected = mx.value_and_grad(whole)(hidden)
    loss, gradient = value_and_grad(CrossEntropy(100), hidden, head, labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("width", [8, 3072])
@pytest.mark.parametrize("tokens", [1, 100, 5000])
@pytest.mark.parametrize("budget", [1, 10**5, 10**7])
def test_a_tile_keeps_to_its_budget(width, tokens, budget):
    rows, chunk = tile_shape(budget, width, tokens, 128_256)
    assert 1 <= rows <= 128_256
    assert 1 <= chunk <= tokens
    if (rows, chunk) != (1, 1):
        assert 4 * (rows * width + 3 * rows * chunk + chunk * width) <= budget


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 21], r"labels: got 21, expected 0 to 20, the vocabulary of the head"),
        ([0, -1, 2], r"labels: got -1, expected 0 to 20"),
        ([0, 1], r"labels: got mlx.core.int32 of shape \(2,\), expected whole numbers, one for"),
        ([0.0, 1.0, 2.0], r"labels: got mlx.core.float32 of shape \(3,\), expected whole"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    hidden, head = mx.ones((3, 4)), MatrixHead(mx.ones((21, 4)))
    for method in (CrossEntropy(), CrossEntropy().value, CrossEntropy().value_and_grad):
        with pytest.raises(ValueError, match=message):
            method(hidden, head, mx.array(labels))


def test_no_labels_and_wrong_widths():
    head = MatrixHead(mx.ones((21, 4)))
    with pytest.raises(ValueError, match="labels: got none, expected at least one"):
        CrossEntropy().value(mx.ones((0, 4)), head, mx.zeros((0,), mx.int32))
    with pytest.raises(ValueError, match="got a width of 5, but rows of the head have 4"):
        CrossEntropy().value(mx.ones((1, 5)), head, mx.array([1]))


# --- memory -------------------------------------------------------------------------------


@pytest.fixture
def large(memory):
    """64 tokens and logits of 16 MiB; gives the arguments and how to measure above them."""
    hidden, weight = mx.random.normal((64, 16)), mx.random.normal((65536, 16))
    labels = mx.random.randint(0, 65536, (64,))
    mx.eval(hidden, weight, labels)

    def above(function):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        function(hidden, weight, labels)
        return mx.get_peak_memory() - before

    return above


def test_the_obvious_loss_holds_all_logits(large):
    def plain(hidden, weight, labels):
        def loss(hidden):
            return nn.losses.cross_entropy(hidden @ weight.T, labels, reduction="mean")

        mx.eval(mx.value_and_grad(loss)(hidden))

    assert large(plain) > 32 * MIB


@frees_at_once
@pytest.mark.parametrize("budget", [MIB // 2, 2 * MIB])
def test_peak_keeps_to_the_budget(large, budget):
    def exact(hidden, weight, labels):
        CrossEntropy(budget).value_and_grad(hidden, MatrixHead(weight), labels)

    # A running sum and its successor, hidden states and gradient are 4 KiB each.
    assert large(exact) < budget + 64 * 1024


@frees_at_once
@pytest.mark.parametrize("budget", [MIB // 2, 2 * MIB])
def test_tiles_are_alive_one_at_a_time_inside_a_graph_too(large, budget):
    """Without `mx.depends` on the step before this holds more than all logits."""

    def lazy(hidden, weight, labels):
        loss = CrossEntropy(budget)
        mx.eval(mx.value_and_grad(lambda h: loss(h, MatrixHead(weight), labels)[0])(hidden))

    assert large(lazy) < 2 * budget
