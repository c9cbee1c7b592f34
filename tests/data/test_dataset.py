"""The compact store of tokenized rows and its report."""

import numpy as np
import pytest

from mlx_edgelora.data import Dataset, Row
from mlx_edgelora.errors import EdgeLoraError


def make_dataset(*rows, limit=4, name="train.jsonl"):
    return Dataset((Row(f"{name}: line", n, *row) for n, row in enumerate(rows, 1)), limit, name)


def test_rows_come_back_as_int32():
    dataset = make_dataset(([1, 2, 3], 0), ([4, 5], 1))
    tokens, offset = dataset[1]
    assert (tokens.dtype, tokens.tolist(), offset) == (np.int32, [4, 5], 1)
    assert [tokens.tolist() for tokens, _ in dataset] == [[1, 2, 3], [4, 5]]
    with pytest.raises(IndexError, match="row 2 of 2"):
        dataset[2]
    assert dataset.report.warning() is None


def test_long_rows_are_truncated_and_counted():
    dataset = make_dataset(([1, 2, 3, 4, 5], 0), ([1, 2, 3, 4], 0), ([1] * 9, 3))
    assert [len(tokens) for tokens, _ in dataset] == [4, 4, 4]
    assert (dataset.report.truncated, dataset.report.longest) == (2, 9)
    assert dataset.report.warning() == (
        "train.jsonl: of 3 rows, 2 longer than max_seq_length 4 (up to 9 tokens) and truncated"
    )


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
        "train.jsonl: of 2 rows, 1 longer than max_seq_length 4 (up to 5 tokens) and truncated "
        "and 1 without a token to train on and left out"
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
    with pytest.raises(EdgeLoraError, match=r"^train\.jsonl: has no rows, expected at least one"):
        make_dataset()


def test_a_row_costs_little_more_than_its_tokens():
    dataset = make_dataset(*[([1] * 50, 0)] * 1000, limit=64)
    stored = (dataset._tokens, dataset._starts, dataset._offsets, dataset._numbers)
    assert sum(len(part) * part.itemsize for part in stored) <= 1000 * (50 * 4 + 20) + 8
