"""Which tokens the approximate loss looks at: the union, or under a cap its most frequent part."""

import tracemalloc
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import listed, subsets

from mlx_edgelora.losses import approximate
from mlx_edgelora.losses.approximate import choose_subset

MIB = 2**20


def chosen_slowly(labels, table, cap):
    """The definition, token by token."""
    counts = Counter(int(label) for label in labels)
    frequency, rank = Counter(), {}
    for label, count in counts.items():
        for place, token in enumerate(int(t) for t in table[label]):
            frequency[token] += count
            rank[token] = min(place, rank.get(token, place))
    others = sorted(set(frequency) - set(counts), key=lambda t: (-frequency[t], rank[t], t))
    room = len(others) if cap is None else max(0, cap - len(counts))
    return sorted(set(counts) | set(others[:room]))


@settings(max_examples=100, deadline=None)
@given(given=subsets(), at_once=st.integers(1, 10))
def test_subset_is_the_union_or_its_most_frequent_part(given, at_once):
    (_, _, labels), table, cap = given
    with mock.patch.object(approximate, "LABELS_AT_ONCE", at_once):
        subset = choose_subset(labels, listed(table), cap)
    assert subset.tolist() == chosen_slowly(labels, table, cap)
    assert np.isin(labels, subset).all()
    if cap is not None:
        assert len(subset) <= max(cap, len(set(labels.tolist())))
    order = np.random.RandomState(1).permutation(len(labels))
    assert np.array_equal(choose_subset(labels[order], listed(table), cap), subset)


@pytest.mark.parametrize("at_once", [1, 128])
def test_who_stays_under_a_cap(monkeypatch, at_once):
    monkeypatch.setattr(approximate, "LABELS_AT_ONCE", at_once)
    table = np.zeros((100, 4), int)
    table[1] = [1, 50, 60, 70]
    table[2] = [2, 61, 60, 80]
    labels = np.array([1, 2, 2])
    kept = [set(choose_subset(labels, listed(table), cap).tolist()) - {1, 2} for cap in range(1, 8)]
    # 60 is near all three labels; 61 and 80 near two, 61 nearer; then 50 before 70.
    order = [60, 61, 80, 50, 70]
    assert kept == [set(), *(set(order[:count]) for count in range(6))]


def test_more_labels_than_the_cap_all_stay():
    labels = np.arange(300)
    subset = choose_subset(labels, listed((np.arange(400)[:, None] + [0, 1]) % 400), 7)
    assert subset.tolist() == labels.tolist()


@pytest.mark.parametrize("cap", [None, 5000])
def test_choosing_needs_no_copy_of_all_neighbours(cap):
    """2,000 labels with 500 neighbours: 3.8 MiB, of which 128 labels are looked at together."""
    table = np.random.RandomState(0).randint(0, 20_000, (2000, 500), np.int32)
    labels = np.arange(2000)
    choose_subset(labels, listed(table), cap)
    tracemalloc.start()
    choose_subset(labels, listed(table), cap)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * MIB
