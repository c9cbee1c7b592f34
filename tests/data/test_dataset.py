"""The compact store of tokenized rows and its report."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_edgelora.data import Dataset, Row
from mlx_edgelora.data.spans import count_labels, label_mask, spans_of
from mlx_edgelora.errors import EdgeLoraError


def make_dataset(*rows, limit=4, name="train.jsonl"):
    return Dataset((Row(f"{name}: line", n, *row) for n, row in enumerate(rows, 1)), limit, name)


def test_rows_come_back_as_int32():
    dataset = make_dataset(([1, 2, 3], 0), ([4, 5], 1))
    tokens, spans = dataset[1]
    assert (tokens.dtype, tokens.tolist()) == (np.int32, [4, 5])
    assert (spans.dtype, spans.tolist()) == (np.int32, [[1, 2]])
    assert [tokens.tolist() for tokens, _ in dataset] == [[1, 2, 3], [4, 5]]
    with pytest.raises(IndexError, match="row 2 of 2"):
        dataset[2]
    assert dataset.report.warning() is None


def test_long_rows_are_truncated_and_counted():
    dataset = make_dataset(([1, 2, 3, 4, 5], 0), ([1, 2, 3, 4], 0), ([1] * 9, 3))
    assert [len(tokens) for tokens, _ in dataset] == [4, 4, 4]
    assert (dataset.report.truncated, dataset.report.longest) == (2, 9)
    assert (dataset.report.tokens, dataset.report.labels, dataset.report.labels_cut) == (12, 7, 6)
    assert dataset.report.warning() == (
        "train.jsonl: of 3 rows, 2 longer than max_seq_length 4 (up to 9 tokens) and truncated, "
        "which cuts 46 % of the labels"
    )


def test_a_row_that_is_cut_in_several_pieces_is_counted_once():
    pieces = [Row("train.jsonl: line", 1, [1] * n, 0) for n in (5, 3, 6)]
    report = Dataset([*pieces, Row("train.jsonl: line", 2, [1] * 5, 0)], 4, "train.jsonl").report
    assert (report.rows, report.truncated) == (2, 2)


def test_rows_with_nothing_to_train_are_left_out_counted_and_places_stay_right():
    dataset = make_dataset(([1], 0), ([1, 2], 0), ([1, 2, 3, 4, 5], 4), ([], 0), ([1, 2, 3], 2))
    assert (len(dataset), dataset.report.rows, dataset.report.dropped) == (2, 5, 3)
    assert dataset.report.truncated == 0
    assert [dataset.place(i) for i in range(2)] == ["train.jsonl: line 2", "train.jsonl: line 5"]
    assert dataset.report.warning() == (
        "train.jsonl: of 5 rows, 3 without a token to train on and left out"
    )


def test_both_are_one_warning():
    dataset = make_dataset(([1], 0), ([1] * 5, 0))
    assert dataset.report.warning() == (
        "train.jsonl: of 2 rows, 1 longer than max_seq_length 4 (up to 5 tokens) and truncated, "
        "which cuts 25 % of the labels and 1 without a token to train on and left out"
    )


def test_places_of_several_sources():
    rows = [Row(source, n, [1, 2], 0) for source in ("a row", "b row") for n in (1, 2)]
    dataset = Dataset(rows, 8, "a + b")
    assert [dataset.place(i) for i in range(4)] == ["a row 1", "a row 2", "b row 1", "b row 2"]


def test_nothing_to_train_at_all_names_the_data_set():
    with pytest.raises(
        EdgeLoraError, match=r"^train\.jsonl: none of its 2 rows has a token .* max_seq_length 4;"
    ):
        make_dataset(([1], 0), ([1, 2, 3, 4, 5], 4))
    with pytest.raises(EdgeLoraError) as caught:  # no limit is in the way, so none is named
        make_dataset(([1], 0), ([1, 2], 2))
    assert str(caught.value) == (
        "train.jsonl: none of its 2 rows has a token to train on; add rows with an answer to train "
        "on"
    )
    with pytest.raises(EdgeLoraError, match=r"^train\.jsonl: has no rows, expected at least one"):
        make_dataset()


def test_a_row_costs_little_more_than_its_tokens():
    dataset = make_dataset(*[([1] * 50, 0)] * 1000, limit=64)
    names = ("_tokens", "_starts", "_numbers", "_spans", "_span_starts")
    stored = [getattr(dataset, name) for name in names]
    assert sum(len(part) * part.itemsize for part in stored) <= 1000 * (50 * 4 + 24 + 8) + 16


def test_labelled_spans_come_back_cut_to_the_row():
    dataset = make_dataset(([1, 2, 3, 4, 5, 6], [(0, 2), (3, 6)]), ([7, 8, 9], np.int32([[2, 3]])))
    assert [spans.tolist() for _, spans in dataset] == [[[1, 2], [3, 4]], [[2, 3]]]
    assert dataset.labels().tolist() == [2, 4, 9]
    dropped = make_dataset(([1, 2], []), ([1, 2, 3, 4, 5], [(4, 5)]), ([1, 2], [(1, 2)]))
    assert (len(dropped), dropped.report.dropped) == (1, 2)


@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), max_size=5), st.integers(0, 9))
def test_spans_are_in_order_apart_and_cover_what_was_given(pairs, length):
    spans = spans_of(pairs, length)
    assert spans.dtype == np.int32 and spans.shape[1] == 2
    expected = {i for start, stop in pairs for i in range(max(start, 1), min(stop, length))}
    assert count_labels(spans) == len(expected)
    mask = label_mask([spans], max(length, 1))
    assert set(np.flatnonzero(mask[0]) + 1) == expected
    flat = spans.reshape(-1).tolist()
    assert flat == sorted(set(flat))


def test_an_offset_is_one_span_to_the_end():
    assert [spans_of(offset, 4).tolist() for offset in (0, 1, 3)] == [[[1, 4]], [[1, 4]], [[3, 4]]]
    assert spans_of(4, 4).shape == spans_of(0, 1).shape == spans_of(0, 0).shape == (0, 2)
