"""Heads, labels and neighbours for the property tests of losses, and what a loss is asked for."""

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st


def value_and_grad(loss, hidden, head, labels):
    """The loss and its gradient, the same in all three ways of asking."""
    (value, count), gradients = loss.value_and_grad(hidden, head, labels)
    alone, _ = loss.value(hidden, head, labels)
    inside, again = mx.value_and_grad(lambda hidden: loss(hidden, head, labels)[0])(hidden)
    assert count == labels.size
    assert value.item() == alone.item() == inside.item()
    assert mx.array_equal(gradients.hidden, again).item()
    assert gradients.hidden.dtype == hidden.dtype
    assert (value.shape, value.dtype) == ((), mx.float32)
    assert (gradients.down, gradients.up) == (None, None)
    return value, gradients.hidden


def listed(table):
    """Neighbours [vocabulary, k] that somebody wrote down."""
    return lambda tokens: np.asarray(table)[tokens]


@st.composite
def cases(draw, scale=2):
    """Integers, so that float32 logits are exact: differences are the loss's own."""
    n, vocabulary, width = (draw(st.integers(1, high)) for high in (9, 60, 5))
    rng = np.random.RandomState(draw(st.integers(0, 10_000)))
    hidden = rng.randint(-scale, scale + 1, (n, width))
    weight = rng.randint(-scale, scale + 1, (vocabulary, width))
    labels = rng.randint(0, min(vocabulary, draw(st.integers(1, 60))), n)  # some or all repeat
    return hidden, weight, labels


@st.composite
def subsets(draw):
    """A case, a table of neighbours and a cap."""
    case = draw(cases())
    vocabulary = len(case[1])
    rng = np.random.RandomState(draw(st.integers(0, 10_000)))
    k = draw(st.integers(1, vocabulary))
    table = np.array([rng.permutation(vocabulary)[:k] for _ in range(vocabulary)])
    return case, table, draw(st.one_of(st.none(), st.integers(1, vocabulary)))
