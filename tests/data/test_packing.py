"""Rows that share a row: every row is there once, whole, and labelled as it was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.data import iterate_batches
from mlx_edgelora.data import packing as packing_module
from mlx_edgelora.data.batches import count_batches
from mlx_edgelora.data.packing import mean_context, most_labels, most_shared, pack

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(40, 90), st.integers(0, 9))
def test_every_row_is_in_one_shared_row(lengths, capacity, seed):
    lengths = np.array(lengths)
    shared = pack(lengths, capacity, np.random.RandomState(seed))
    assert sorted(np.concatenate(shared).tolist()) == list(range(len(lengths)))
    sizes = [int(lengths[row].sum()) for row in shared]
    assert max(sizes) <= capacity
    assert len(shared) <= most_shared(lengths, capacity)
    # First fit: no later row has room in an earlier one, and so on the whole few are needed.
    assert sum(size <= capacity / 2 for size in sizes) <= 1


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 9))
def test_windows_are_packed_apart(lengths, seed):
    lengths = np.array(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "WINDOW", 8)
        shared = pack(lengths, 45, np.random.RandomState(seed))
        assert len(shared) <= most_shared(lengths, 45)
    order = np.random.RandomState(seed).permutation(len(lengths)).tolist()
    windows = [{order.index(i) // 8 for i in row} for row in shared]
    assert all(len(window) == 1 for window in windows)
    assert sorted(np.concatenate(shared).tolist()) == list(range(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 9))
def test_batches_hold_the_rows_and_their_spans(lengths, batch_size, seed):
    random = np.random.RandomState(seed)
    rows = []
    for length in lengths:
        cuts = np.sort(random.randint(1, length + 1, 4))
        spans = [tuple(cuts[:2]), tuple(cuts[2:]), (length - 1, length)]
        rows.append((random.randint(1, 99, length).tolist(), spans))
    seen = []
    for batch in iterate_batches(rows, batch_size, 45, seed=seed, packing=True):
        assert len(batch.tokens) <= batch_size and batch.tokens.shape[1] <= 45
        assert batch.mask.shape == batch.inputs().shape
        left = list(batch.indices)
        for i, row in enumerate(batch.tokens.tolist()):
            begin = 0
            while left and row[begin : begin + len(rows[left[0]][0])] == rows[left[0]][0]:
                index = left.pop(0)
                tokens, spans = rows[index]
                labelled = {t for start, stop in spans for t in range(start, stop)}
                where = np.flatnonzero(batch.mask[i, begin : begin + len(tokens) - 1]) + 1
                assert set(where.tolist()) == labelled
                if begin:  # the label between two rows
                    assert not batch.mask[i, begin - 1]
                if batch.starts is not None:
                    own = batch.starts[i, begin : begin + len(tokens)]
                    assert (own == begin).all()
                begin += len(tokens)
                seen.append(index)
                if begin + 2 > len(row):
                    break
            assert not any(row[begin:]) and not batch.mask[i, max(0, begin - 1) :].any()
        assert not left
    assert sorted(seen) == list(range(len(rows)))


def test_epochs_and_seeds_have_their_own_groups():
    rows = [(list(range(1, 1 + n)), 0) for n in np.random.RandomState(0).randint(3, 20, 60)]

    def groups(seed):
        count = count_batches(rows, 2, 64, epochs=2, seed=seed, packing=True)
        batches = iterate_batches(rows, 2, 64, loop=True, seed=seed, packing=True)
        return [batch.indices for _, batch in zip(range(count), batches, strict=False)]

    first = groups(1)
    assert first == groups(1) != groups(2)
    assert sorted(sum(first, ())) == sorted(2 * list(range(60)))
    assert len(set(first)) == len(first)


def test_rows_that_share_nothing_are_an_ordinary_batch():
    rows = [(list(range(1, 41)), 0)] * 4
    (batch,) = iterate_batches(rows, 4, 50, packing=True)
    assert batch.starts is None


def test_what_attention_costs_by():
    assert mean_context([10, 10, 10]) == 10
    assert mean_context([10, 30]) == 25  # three of four tokens are in the row of 30


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 300), st.integers(0, 9))
def test_no_choice_of_rows_has_more_labels(lengths, room, seed):
    random = np.random.RandomState(seed)
    lengths = np.array(lengths)
    labels = random.randint(1, lengths)
    bound = most_labels(lengths, labels, room)
    for _ in range(20):
        order = random.permutation(len(lengths))
        chosen = order[np.cumsum(lengths[order]) <= room]
        assert labels[chosen].sum() <= bound
