"""The approximate loss: the exact one where nothing is left out, its definition where much is."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import relative_error
from backends import frees_at_once
from harness import engine, save
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import cases, listed, subsets, value_and_grad
from loss_references import cross_entropy, terms
from pairwise import pairwise
from peaks import above, lowest

from mlx_edgelora.losses.approximate import ApproximateCrossEntropy, choose_subset
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.losses.head import Adapter, MatrixHead
from mlx_edgelora.losses.neighbours import nearest, row_sum

MIB = 2**20


def nearest_in(head, k):
    """Neighbours by cosine similarity, computed when asked for."""
    return lambda tokens: np.array(nearest(head, mx.array(tokens), k))


# --- where nothing is left out ------------------------------------------------------------


# From one row and one token per tile up to everything in one.
budgets = st.integers(1, 20_000)


@settings(max_examples=60, deadline=None)
@given(case=cases(), budget=budgets, corrected=st.booleans(), capped=st.booleans())
def test_with_the_whole_vocabulary_it_is_the_exact_loss(case, budget, corrected, capped):
    hidden, weight, labels = (mx.array(a) for a in case)
    hidden, weight = hidden.astype(mx.float32), weight.astype(mx.float32)
    logits_transform = (lambda products: 3 * mx.tanh(products / 3)) if capped else None
    head, exact = MatrixHead(weight, logits_transform=logits_transform), CrossEntropy(budget)
    loss = ApproximateCrossEntropy(
        nearest_in(head, head.vocabulary),
        total=row_sum(head, 40) if corrected else None,
        exact=exact,
    )
    (expected, _), reference = exact.value_and_grad(hidden, head, labels)
    got, gradient = value_and_grad(loss, hidden, head, labels)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    assert mx.abs(gradient - reference.hidden).max().item() <= 1e-6
    if not capped:
        check_definition(case, np.arange(len(case[1])), got, gradient, corrected)


def test_with_the_whole_vocabulary_at_a_real_width():
    hidden, weight = mx.random.normal((33, 3072)), 0.02 * mx.random.normal((701, 3072))
    labels, head, exact = mx.random.randint(0, 701, (33,)), MatrixHead(weight), CrossEntropy(MIB)
    (expected, _), reference = exact.value_and_grad(hidden, head, labels)
    # No label's neighbours are all tokens, but their union is.
    loss = ApproximateCrossEntropy(nearest_in(head, 600), None, row_sum(head), exact)
    assert loss.restrict(hidden, head, labels)[0].vocabulary == 701
    got, gradient = value_and_grad(loss, hidden, head, labels)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, reference.hidden) < 1e-5


# --- the definition -----------------------------------------------------------------------


def definition(case, subset, corrected, bias=None):
    """Rows, their biases, offsets and the labels' places among them, in float64."""
    hidden, weight, labels = (np.asarray(a, np.float64) for a in case)
    bias = np.zeros(len(weight)) if bias is None else np.asarray(bias, np.float64)
    rest = np.setdiff1d(np.arange(len(weight)), subset)
    rows, biases, offsets = weight[subset], bias[subset], np.zeros(len(subset))
    if corrected and len(rest):
        rows = np.vstack([rows, weight[rest].mean(axis=0)])
        biases, offsets = (
            np.append(biases, bias[rest].mean()),
            np.append(offsets, np.log(len(rest))),
        )
    places = np.array([list(subset).index(label) for label in labels.astype(int)])
    return hidden, rows, biases, offsets, places


def check_definition(case, subset, got, gradient, corrected, bias=None):
    """Against float64."""
    hidden, rows, biases, offsets, places = definition(case, subset, corrected, bias)
    expected, error = cross_entropy(hidden @ rows.T + biases + offsets, places)
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    missed = np.linalg.norm(np.array(gradient, np.float64) - error @ rows)
    # Of the terms, not of their sum: with equal logits it is zero, and thirds do not add to it.
    assert missed <= 1e-5 * np.linalg.norm(terms(error, places) @ np.abs(rows)) + 1e-12


@settings(max_examples=80, deadline=None)
@given(given=subsets(), budget=budgets, corrected=st.booleans(), biased=st.booleans())
def test_loss_and_gradient_are_those_of_the_definition(given, budget, corrected, biased):
    case, table, cap = given
    hidden, weight, labels = (mx.array(a) for a in case)
    bias = np.arange(len(case[1])) % 3 - 1 if biased else None
    head = MatrixHead(
        weight.astype(mx.float32), None if bias is None else mx.array(bias, mx.float32)
    )
    loss = ApproximateCrossEntropy(
        listed(table), cap, row_sum(head) if corrected else None, CrossEntropy(budget)
    )
    subset = choose_subset(case[2], listed(table), cap)
    assert np.isin(case[2], subset).all()
    got, gradient = value_and_grad(loss, hidden.astype(mx.float32), head, labels)
    check_definition(case, subset, got, gradient, corrected, bias)


GAIN = mx.random.normal((8,), key=mx.random.key(5))
AROUND = {
    "nothing": {},
    "norm": {"final_norm": lambda x: mx.fast.rms_norm(x, GAIN, 1e-5)},
    "capped": {"logits_transform": lambda products: 5 * mx.tanh(products / 5)},
    "all": {
        "final_norm": lambda x: mx.fast.rms_norm(x, GAIN, 1e-5),
        "logits_transform": lambda products: 3 * mx.tanh(0.5 * products / 3),
    },
}
TABLE = np.random.RandomState(0).randint(0, 21, (21, 4))
LABELS = [0, 20, 7, 7, 13, 1, 0]


@pytest.mark.parametrize(
    ("around", "biased", "corrected", "budget"),
    pairwise(AROUND, [False, True], [False, True], [1, 1500, 10**6]),
)
def test_gradient_is_that_of_autodiff(around, biased, corrected, budget):
    """Of all that lies around the head; the row of the tail goes the same way as the others."""
    keys = mx.random.split(mx.random.key(1), 3)
    hidden, weight = mx.random.normal((7, 8), key=keys[0]), mx.random.normal((21, 8), key=keys[1])
    bias = mx.random.normal((21,), key=keys[2]) if biased else None
    names = AROUND[around]
    final_norm, logits_transform = (
        names.get(n, lambda x: x) for n in ("final_norm", "logits_transform")
    )
    subset = np.union1d(LABELS, TABLE[LABELS])
    assert 12 < len(subset) < 20

    _, *arrays, places = definition((hidden, weight, LABELS), subset, corrected, bias)
    rows, biases, offsets = (mx.array(a, mx.float32) for a in arrays)

    def whole(hidden):
        logits = logits_transform(final_norm(hidden) @ rows.T + biases) + offsets
        return nn.losses.cross_entropy(logits, mx.array(places), reduction="mean")

    expected, reference = mx.value_and_grad(whole)(hidden)
    head = MatrixHead(weight, bias, **names)
    total = row_sum(head, 300) if corrected else None
    loss = ApproximateCrossEntropy(listed(TABLE), None, total, CrossEntropy(budget))
    got, gradient = value_and_grad(loss, hidden, head, mx.array(LABELS))
    assert got.item() == pytest.approx(expected.item(), rel=2e-6)
    assert relative_error(gradient, reference) < 1e-5


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "tail"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sums_are_float32_with_half_inputs(dtype, corrected):
    hidden, weight = mx.random.normal((6, 64)).astype(dtype), mx.random.normal((501, 64))
    weight, labels = weight.astype(dtype), [0, 20, 7, 7, 13, 500]
    head, numbers = MatrixHead(weight), [np.array(a.astype(mx.float32)) for a in (hidden, weight)]
    near = nearest_in(head, 40)
    subset = choose_subset(np.array(labels), near)
    inputs, rows, _, offsets, places = definition((*numbers, labels), subset, corrected)
    expected, error = cross_entropy(inputs @ rows.T + offsets, places)
    loss = ApproximateCrossEntropy(
        near, None, row_sum(head) if corrected else None, CrossEntropy(4000)
    )
    got, gradient = value_and_grad(loss, hidden, head, mx.array(labels))
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.dtype == dtype
    rounded = mx.array(error @ rows).astype(dtype)
    assert relative_error(gradient.astype(mx.float32), rounded.astype(mx.float32)) < 2e-3


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "tail"])
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2"])
def test_packed_heads_of_real_models(name, streamed, corrected, tmp_path):
    """Norm, tied or untied packed rows, capping and scaling, from memory and from disk."""
    ours = engine(save(tmp_path, name, quantized=True), streamed=streamed)
    head = ours.head
    hidden, labels = mx.random.normal((9, 64)), mx.array([3, 100, 3, 0, 57, 58, 2, 2, 99])
    near = nearest_in(head, 5)
    subset = choose_subset(np.array(labels), near)
    weight = head.unpack(head.slice(0, 101)).weight
    case = (np.zeros((9, 64)), np.array(weight), np.array(labels))
    _, rows, _, offsets, places = definition(case, subset, corrected)
    rows, offsets = mx.array(rows, mx.float32), mx.array(offsets, mx.float32)

    def whole(hidden):
        products = head.final_norm(hidden).astype(mx.float32) @ rows.T
        logits = products if head.logits_transform is None else head.logits_transform(products)
        return nn.losses.cross_entropy(logits + offsets, mx.array(places), reduction="mean")

    expected, reference = mx.value_and_grad(whole)(hidden)
    total = row_sum(head, 4000) if corrected else None
    loss = ApproximateCrossEntropy(near, None, total, CrossEntropy(9000))
    got, gradient = value_and_grad(loss, hidden, head, labels)
    assert got.item() == pytest.approx(expected.item(), rel=2e-6)
    assert relative_error(gradient, reference) < 1e-5
    ours.close()


def test_a_subset_of_one_token():
    head, hidden, labels = MatrixHead(mx.random.normal((9, 4))), mx.ones((2, 4)), mx.array([3, 3])
    got, gradient = value_and_grad(
        ApproximateCrossEntropy(listed(np.arange(9)[:, None])), hidden, head, labels
    )
    assert (got.item(), mx.abs(gradient).max().item()) == (0.0, 0.0)


def test_rows_left_out_are_not_read():
    """Compute is what the approximation is for."""
    taken = Counter()

    class Counting(MatrixHead):
        def slice(self, start, stop):
            pytest.fail("read by range")

        def take(self, indices):
            taken.update(indices.tolist())
            return super().take(indices)

    weight, labels = mx.random.normal((50, 4)), mx.array([4, 9, 9])
    table = (np.arange(50)[:, None] + [0, 1, 20]) % 50
    loss = ApproximateCrossEntropy(listed(table), total=row_sum(MatrixHead(weight)))
    loss.value(mx.ones((3, 4)), Counting(weight), labels)
    assert taken == Counter([4, 5, 24, 9, 10, 29])


# --- what the approximation costs ---------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(given=subsets())
def test_the_subset_alone_is_biased_low_and_the_tail_never_overshoots(given):
    """A sum of some of the masses; and by Jensen a mean row weighs less than its rows."""
    (hidden, weight, labels), table, cap = given
    head = MatrixHead(mx.array(weight, mx.float32))
    arguments = (mx.array(hidden, mx.float32), head, mx.array(labels))
    plain, tail, exact = (
        loss.value(*arguments)[0].item()
        for loss in (
            ApproximateCrossEntropy(listed(table), cap),
            ApproximateCrossEntropy(listed(table), cap, row_sum(head)),
            CrossEntropy(),
        )
    )
    left_out = len(weight) - len(choose_subset(labels, listed(table), cap))
    assert plain <= tail + 1e-5
    assert tail <= exact + 1e-5
    assert (plain < exact) == (left_out > 0)


@pytest.mark.parametrize("k", [10, 50, 200])
def test_the_tail_takes_most_of_the_bias_away_on_a_clustered_head(k):
    rng = np.random.RandomState(0)
    centres = rng.normal(size=(40, 64))
    weight = np.repeat(centres, 50, axis=0) + 0.7 * rng.normal(size=(2000, 64))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    labels = rng.randint(0, 2000, 24)
    hidden = 5 * weight[labels] + 0.3 * rng.normal(size=(24, 64))
    head = MatrixHead(mx.array(weight, mx.float32))
    arguments = (mx.array(hidden, mx.float32), head, mx.array(labels))
    (exact, _), reference = CrossEntropy().value_and_grad(*arguments)
    biases, cosines = [], []
    for total in (None, row_sum(head)):
        loss = ApproximateCrossEntropy(nearest_in(head, k), None, total)
        (value, _), gradient = loss.value_and_grad(*arguments)
        biases.append(value.item() - exact.item())
        cosines.append(cosine(gradient.hidden, reference.hidden))
    assert biases[0] < -0.05
    assert abs(biases[1]) < abs(biases[0]) / 4
    assert cosines[1] > cosines[0]


def cosine(a, b):
    return ((a * b).sum() / mx.linalg.norm(a) / mx.linalg.norm(b)).item()


# --- what does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 21], r"labels: got 21, expected 0 to 20, the vocabulary of the head"),
        ([0, -1, 2], r"labels: got -1, expected 0 to 20"),
        ([0, 1], r"labels: got mlx.core.int32 of shape \(2,\), expected whole numbers, one for"),
        ([0.0, 1.0, 2.0], r"labels: got mlx.core.float32 of shape \(3,\), expected whole"),
        ([], r"labels: got none, expected at least one"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    """Said before neighbours are looked up."""
    loss = ApproximateCrossEntropy(lambda tokens: pytest.fail("looked up"))
    hidden, head = mx.ones((3, 4)), MatrixHead(mx.ones((21, 4)))
    for method in (loss, loss.value, loss.value_and_grad):
        with pytest.raises(ValueError, match=message):
            method(hidden, head, mx.array(labels))


def test_widths_that_differ_and_a_head_with_an_adapter():
    loss = ApproximateCrossEntropy(lambda tokens: pytest.fail("looked up"))
    head = MatrixHead(mx.ones((21, 4)))
    with pytest.raises(ValueError, match="got a width of 5, but rows of the head have 4"):
        loss.value(mx.ones((1, 5)), head, mx.array([1]))
    head.adapter = Adapter(mx.ones((2, 4)), mx.ones((21, 2)), 1.0)
    with pytest.raises(ValueError, match="got a head with an adapter, expected a frozen one"):
        loss.value_and_grad(mx.ones((1, 4)), head, mx.array([1]))


def test_settings_that_mean_nothing():
    with pytest.raises(ValueError, match="max_subset: got 0, expected at least 1"):
        ApproximateCrossEntropy(listed(TABLE), max_subset=0)
    with pytest.raises(ValueError, match=r"label_smoothing: got 0\.1, expected 0"):
        ApproximateCrossEntropy(listed(TABLE), exact=CrossEntropy(label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint32, mx.int64])
def test_labels_of_any_whole_dtype(dtype):
    hidden, head = mx.random.normal((7, 4)), MatrixHead(mx.random.normal((21, 4)))
    loss = ApproximateCrossEntropy(listed(TABLE), total=row_sum(head))
    expected = loss.value(hidden, head, mx.array(LABELS))[0]
    assert loss.value(hidden, head, mx.array(LABELS, dtype))[0].item() == expected.item()


# --- memory -------------------------------------------------------------------------------


@pytest.fixture
def large(memory):
    """A subset of 14,099 rows, 3.4 MiB in float32; gives the peak of `loss` above its inputs."""
    hidden, weight = mx.random.normal((64, 64)), mx.random.normal((20_000, 64)).astype(mx.bfloat16)
    labels = mx.random.randint(0, 20_000, (64,))
    head = MatrixHead(weight)
    table = (np.arange(20_000)[:, None] + 61 * np.arange(350)) % 20_000
    total = row_sum(head)
    mx.eval(hidden, weight, labels, total.weight)
    subset = choose_subset(np.array(labels), listed(table))
    assert len(subset) == 14_099

    def peak(budget, corrected, function):
        exact = CrossEntropy(budget)
        loss = ApproximateCrossEntropy(listed(table), None, total if corrected else None, exact)
        return above(lambda: function(loss, hidden, head, labels))

    return peak


@frees_at_once
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "tail"])
def test_peak_keeps_to_the_budget(large, corrected):
    def settled(loss, *arguments):
        loss.value_and_grad(*arguments)

    # Four arrays of tokens x width are 16 KiB each, the subset's numbers 8 bytes a row.
    bound = MIB // 2 + 64 * 1024 + 160_000
    assert lowest(lambda: large(MIB // 2, corrected, settled), bound) < bound


@frees_at_once
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "tail"])
def test_tiles_are_alive_one_at_a_time_inside_a_graph_too(large, corrected):
    """The sum that the tail is made of must not keep every tile waiting."""

    def lazy(loss, hidden, *rest):
        mx.eval(mx.value_and_grad(lambda hidden: loss(hidden, *rest)[0])(hidden))

    bound = MIB + 160_000
    assert lowest(lambda: large(MIB // 2, corrected, lazy), bound) < bound
