"""The loss over whole rows of logits against autodiff, and what it holds in memory."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import relative_error

from mlx_edgelora.losses.chunked import chunked_cross_entropy, in_graph

LABELS = mx.array([0, 20, 7, 7, 13, 1])


def whole(hidden, weight):
    return nn.losses.cross_entropy(hidden @ weight.T, LABELS, reduction="mean")


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_loss_and_gradients_are_exact(rows):
    hidden, weight = mx.random.normal((6, 8)), mx.random.normal((21, 8))
    expected, (slope, of_weight) = mx.value_and_grad(whole, argnums=(0, 1))(hidden, weight)

    def project(hidden, trained):
        return hidden @ trained["w"].T

    loss, gradient, more = chunked_cross_entropy(hidden, LABELS, project, {"w": weight}, rows)
    alone, none, _ = chunked_cross_entropy(
        hidden, LABELS, project, {"w": weight}, rows, gradient=False
    )
    assert none is None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert alone.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, slope) < 1e-5
    assert relative_error(more["w"], of_weight) < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_in_a_graph_it_brings_its_gradients_along(rows, smoothing):
    """Under a cotangent that is not one, and behind a function of what is trained."""
    hidden, weight = mx.random.normal((6, 8)), mx.random.normal((21, 8))

    def square(loss):
        return lambda hidden, trained: loss(mx.sin(hidden), {"w": 2 * trained["w"]}) ** 2

    def expected(hidden, trained):
        logits = hidden @ trained["w"].T
        losses = nn.losses.cross_entropy(logits, LABELS, label_smoothing=smoothing)
        return losses.mean()

    def project(hidden, trained):
        return hidden @ trained["w"].T

    def got(hidden, trained):
        return in_graph(
            lambda hidden, trained: chunked_cross_entropy(
                hidden, LABELS, project, trained, rows, True, smoothing, lambda *_: None
            ),
            hidden,
            trained,
        )

    (value, (slope, more)), (reference, (other, others)) = (
        mx.value_and_grad(square(loss), argnums=(0, 1))(hidden, {"w": weight})
        for loss in (got, expected)
    )
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    assert relative_error(slope, other) < 1e-5
    assert relative_error(more["w"], others["w"]) < 1e-5


def test_what_must_exist_before_the_next_chunk_is_settled_in_turn():
    hidden, settled = mx.random.normal((6, 8)), []
    weight = mx.random.normal((21, 8))

    def project(hidden, trained):
        return hidden @ trained["w"].T

    for gradient in (True, False):
        settled.clear()
        chunked_cross_entropy(
            hidden,
            LABELS,
            project,
            {"w": weight},
            4,
            gradient,
            evaluate=lambda *arrays: settled.append(arrays),
        )
        assert len(settled) == 2  # chunks
        assert [len(arrays) for arrays in settled] == [3 if gradient else 1] * 2


def test_dtypes_are_kept():
    hidden, weight = mx.random.normal((6, 8)), mx.random.normal((21, 8))
    half = {"w": weight.astype(mx.bfloat16)}
    loss, gradient, more = chunked_cross_entropy(
        hidden.astype(mx.bfloat16), LABELS, lambda h, trained: h @ trained["w"].T, half, 4
    )
    assert (loss.dtype, gradient.dtype, more["w"].dtype) == (mx.float32, *2 * [mx.bfloat16])
    assert loss.item() == pytest.approx(whole(hidden, weight).item(), rel=0.02)


def test_rows_of_logits_are_held_and_not_all(memory):
    hidden, weight = mx.random.normal((64, 16)), mx.random.normal((65536, 16))
    labels = mx.random.randint(0, 65536, (64,))
    mx.eval(hidden, weight, labels)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    chunked_cross_entropy(hidden, labels, lambda hidden, _: hidden @ weight.T, {}, 2)
    # Two rows of logits are half a MiB, all of them 16.
    assert mx.get_peak_memory() - before < 5 * 2**20
