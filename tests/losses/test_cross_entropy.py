"""Both tiled losses against a float64 reference, and what they hold in memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.losses.cross_entropy import Tile, chunked_cross_entropy, streamed_cross_entropy

MIB = 2**20


def reference(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss and its gradient with respect to the logits, float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    rows = np.arange(len(labels))
    error = np.exp(logs)
    error[rows, labels] -= 1
    return -logs[rows, labels].mean(), error / len(labels)


def cut(head: mx.array, size: int):
    """Tiles of a head [vocabulary, hidden]."""

    def tiles():
        for start in range(0, head.shape[0], size):
            part = head[start : start + size]
            yield Tile(start, start + part.shape[0], lambda hidden, part=part: hidden @ part.T)

    return tiles


def streamed(hidden, head, labels, size):
    loss, gradient = streamed_cross_entropy(hidden, labels, cut(head, size))
    only, none = streamed_cross_entropy(hidden, labels, cut(head, size), gradient=False)
    assert none is None
    assert only.item() == loss.item()
    return loss, gradient


def chunked(hidden, head, labels, size):
    def project(hidden, trained):
        return hidden @ trained["head"].T

    loss, gradient, more = chunked_cross_entropy(hidden, labels, project, {"head": head}, size)
    only, none, _ = chunked_cross_entropy(
        hidden, labels, project, {"head": head}, size, gradient=False
    )
    assert none is None
    assert only.item() == loss.item()
    _, error = reference(np.array(hidden @ head.T, np.float64), np.array(labels))
    factor = np.abs(np.array(hidden, np.float64))
    missed = np.array(more["head"], np.float64) - error.T @ np.array(hidden, np.float64)
    scale = np.linalg.norm(terms(error, np.array(labels)).T @ factor)
    assert np.linalg.norm(missed) <= 1e-5 * scale
    return loss, gradient


def terms(error: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities plus labels, where `error` has probabilities less labels."""
    result = error.copy()
    result[np.arange(len(labels)), labels] += 2 / len(labels)
    return result


def close(got: mx.array, error: np.ndarray, factor: np.ndarray, labels: np.ndarray) -> bool:
    """Whether `got` is `error @ factor` within 1e-5 of the terms that it is summed from.

    Not of the sum itself: with equal logits it is zero, and no float32 sum of thirds is.
    """
    missed = np.linalg.norm(np.array(got, np.float64) - error @ factor)
    return missed <= 1e-5 * np.linalg.norm(terms(error, labels) @ np.abs(factor))


def case(draw, scale):
    """Integers, so that float32 logits are exact: differences are the loss's own."""
    n, vocabulary, width = (draw(st.integers(1, high)) for high in (7, 60, 5))
    rng = np.random.RandomState(draw(st.integers(0, 10_000)))
    hidden = rng.randint(-scale, scale + 1, (n, width))
    head = rng.randint(-scale, scale + 1, (vocabulary, width))
    labels = rng.randint(0, min(vocabulary, draw(st.integers(1, 60))), n)  # some repeat
    return hidden, head, labels


LOSSES = {"streamed": streamed, "chunked": chunked}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 70), name=st.sampled_from(sorted(LOSSES)))
def test_loss_and_gradient_are_exact(data, size, name):
    hidden, head, labels = case(data.draw, 2)
    expected, error = reference((hidden @ head.T).astype(np.float64), labels)
    loss, gradient = LOSSES[name](
        mx.array(hidden, mx.float32), mx.array(head, mx.float32), mx.array(labels), size
    )
    assert (loss.shape, loss.dtype) == ((), mx.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert close(gradient, error, head, labels)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(1, 70))
def test_streamed_loss_is_exact_for_huge_logits(data, size):
    hidden, head, labels = case(data.draw, 45)  # logits up to 5 * 45 * 45
    expected, error = reference((hidden @ head.T).astype(np.float64), labels)
    loss, gradient = streamed(
        mx.array(hidden, mx.float32), mx.array(head, mx.float32), mx.array(labels), size
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert close(gradient, error, head, labels)


def test_digits_of_the_loss_survive_a_large_maximum():
    """Two equal logits of 10,000 cost log 2, of which float32 at 10,000 keeps three digits."""
    hidden, head = mx.ones((1, 1)), mx.array([[10_000.0], [10_000.0], [-10_000.0]])
    loss, gradient = streamed(hidden, head, mx.array([1]), 2)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)
    assert abs(gradient.item()) < 1e-3  # 10,000 (1/2 + 1/2 - 1)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_in_every_tile(name):
    """Each label alone, so that a label lost at a tile's edge is seen."""
    keys = mx.random.split(mx.random.key(3))
    hidden, head = mx.random.normal((1, 4), key=keys[0]), mx.random.normal((10, 4), key=keys[1])
    logits = np.array(hidden @ head.T, np.float64)
    for label in range(10):
        loss, _ = LOSSES[name](hidden, head, mx.array([label]), 3)
        expected, _ = reference(logits, np.array([label]))
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gradient_passes_what_lies_between_hidden_states_and_logits():
    """A norm, a scale and soft-capping, as models have around their heads."""
    hidden, head = mx.random.normal((6, 8)), mx.random.normal((21, 8))
    labels, gain = mx.array([0, 20, 7, 7, 13, 1]), mx.random.normal((8,))

    def logits(hidden, part):
        return 5 * mx.tanh(mx.fast.rms_norm(hidden, gain, 1e-5) @ part.T / 3)

    def tiles():
        for start in range(0, 21, 4):
            part = head[start : start + 4]
            yield Tile(start, min(start + 4, 21), lambda hidden, part=part: logits(hidden, part))

    def whole(hidden):
        return nn.losses.cross_entropy(logits(hidden, head), labels, reduction="mean")

    expected_loss, expected = mx.value_and_grad(whole)(hidden)
    loss, gradient = streamed_cross_entropy(hidden, labels, tiles)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_dtype_of_the_hidden_states_is_kept(name):
    hidden, head = mx.random.normal((6, 8)), mx.random.normal((21, 8))
    labels = mx.array([0, 20, 7, 7, 13, 1])
    exact, _ = LOSSES[name](hidden, head, labels, 4)
    half = hidden.astype(mx.bfloat16), head.astype(mx.bfloat16)
    if name == "streamed":
        loss, gradient = streamed_cross_entropy(half[0], labels, cut(half[1], 4))
    else:
        loss, gradient, more = chunked_cross_entropy(
            half[0], labels, lambda hidden, trained: hidden @ trained["w"].T, {"w": half[1]}, 4
        )
        assert more["w"].dtype == mx.bfloat16
    assert (loss.dtype, gradient.dtype) == (mx.float32, mx.bfloat16)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.fixture
def large(memory):
    """Logits of 16 MiB."""
    hidden, head = mx.random.normal((64, 16)), mx.random.normal((65536, 16))
    labels = mx.random.randint(0, 65536, (64,))
    mx.eval(hidden, head, labels)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    return hidden, head, labels, before


def test_streamed_loss_holds_tiles_of_the_vocabulary(large):
    hidden, head, labels, before = large
    streamed_cross_entropy(hidden, labels, cut(head, 2048))
    # A tile of logits is half a MiB.
    assert mx.get_peak_memory() - before < 5 * MIB


def test_chunked_loss_holds_rows_of_logits(large):
    hidden, head, labels, before = large
    chunked_cross_entropy(hidden, labels, lambda hidden, _: hidden @ head.T, {}, 2)
    # Two rows of logits are half a MiB.
    assert mx.get_peak_memory() - before < 5 * MIB


def test_the_obvious_loss_holds_all_logits(large):
    hidden, head, labels, before = large

    def loss(hidden):
        return nn.losses.cross_entropy(hidden @ head.T, labels, reduction="mean")

    mx.eval(mx.value_and_grad(loss)(hidden))
    assert mx.get_peak_memory() - before > 16 * MIB
