"""Batches: mlx-lm's where mlx-lm's are right, and each of its defects shown beside ours."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset

from mlx_edgelora.data import Dataset, Row, iterate_batches
from mlx_edgelora.data.batches import count_batches, largest_batch, padding_share
from mlx_edgelora.errors import EdgeLoraError


def make_rows(lengths, offset=0, seed=0):
    """Random rows of (tokens, offset), with no token 0, which pads."""
    random = np.random.RandomState(seed)
    return [(random.randint(1, 99, size=length).tolist(), offset) for length in lengths]


def make_dataset(rows, max_seq_length=64):
    return Dataset(
        (Row("train.jsonl: line", n, *row) for n, row in enumerate(rows, start=1)),
        max_seq_length,
        "train.jsonl",
    )


def take(iterator, count):
    return [batch for _, batch in zip(range(count), iterator, strict=False)]


def their_mask(lengths, width):
    """The mask inside mlx_lm.tuner.trainer.default_loss, read off by a loss of ones."""

    class Ones:
        def __call__(self, inputs):
            return mx.zeros((*inputs.shape, 2))

    batch = mx.zeros((1, width), mx.int32)
    return trainer.default_loss(Ones(), batch, mx.array([lengths]))[1].item()


class Raw:
    """Rows as dictionaries under mlx-lm's CacheDataset."""

    def __init__(self, rows):
        self.rows = [{"text": row} for row in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def process(self, row):
        return row["text"]


@pytest.mark.parametrize("wrap", [list, make_dataset])
@pytest.mark.parametrize("lengths", [[40] * 20, list(range(40, 60)), [41, 40] * 500])
def test_rows_that_reach_the_limit_come_as_in_mlx_lm(wrap, lengths):
    rows = make_rows(lengths, offset=5)
    ours = take(iterate_batches(wrap(rows), 4, 40, loop=True, seed=3), 17)  # 3 epochs and more
    theirs = trainer.iterate_batches(CacheDataset(Raw(rows)), 4, 40, loop=True, seed=3)
    for batch, (tokens, lengths_and_offsets) in zip(ours, take(theirs, 17), strict=True):
        assert batch.tokens.dtype == np.int32
        assert np.array_equal(batch.tokens, np.array(tokens))
        steps, bounds = np.arange(1, tokens.shape[1]), np.array(lengths_and_offsets)
        theirs_mask = (steps >= bounds[:, :1]) & (steps <= bounds[:, 1:])
        assert np.array_equal(batch.mask, theirs_mask)


def test_several_spans_of_a_row_are_labels_and_what_is_between_is_not():
    (tokens, _), spans = make_rows([40])[0], [(0, 3), (10, 12), (39, 40)]
    for rows in ([(tokens, spans)], make_dataset([(tokens, spans)])):
        (batch,) = iterate_batches(rows, 1, 65)
        assert batch.tokens.shape == (1, 65) and batch.mask.shape == (1, 64)
        assert np.flatnonzero(batch.mask[0]).tolist() == [0, 1, 9, 10, 38]
        assert largest_batch([rows], 1, 65) == (1, 64, 5, 64)
    with pytest.raises(EdgeLoraError, match=r"^row 0: has no token to train on within"):
        iterate_batches([(tokens, [(20, 30)])], 1, 16)


def test_the_global_random_state_is_left_alone():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    take(iterate_batches(make_rows([9] * 8), 2, 40, seed=3), 4)
    assert np.array_equal(np.random.get_state()[1], before)


def test_a_seed_gives_the_order_and_each_epoch_has_its_own():
    def order(seed, epochs=2):
        batches = iterate_batches(make_rows([9] * 20), 2, 40, loop=True, seed=seed)
        return [batch.indices for batch in take(batches, 10 * epochs)]

    assert order(1) == order(1) != order(2)
    first, second = order(1)[:10], order(1)[10:]
    assert first != second and sorted(first) == sorted(second)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 90), st.integers(0, 1)), min_size=4, max_size=30),
    st.integers(1, 4),
    st.integers(3, 70),
)
def test_every_batch_holds_its_rows_and_labels_real_tokens_only(shapes, batch_size, limit):
    rows = [make_rows([length], offset, seed)[0] for seed, (length, offset) in enumerate(shapes)]
    seen = []
    for batch in iterate_batches(rows, batch_size, limit, seed=0):
        width = batch.tokens.shape[1]
        longest = max(min(len(rows[index][0]), limit) for index in batch.indices)
        assert width == limit or ((width - 1) % 32 == 0 and 0 < width - longest <= 32)
        assert batch.inputs().shape == batch.labels().shape == batch.mask.shape
        for i, index in enumerate(batch.indices):
            tokens, offset = rows[index]
            kept = tokens[:limit]
            assert batch.tokens[i].tolist() == kept + [0] * (width - len(kept))
            assert batch.labels()[i][batch.mask[i]].tolist() == kept[max(offset, 1) :]
        seen += batch.indices
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize(("device", "most"), [(mx.cpu, 64), (mx.gpu, 28)])
def test_batches_have_few_lengths(monkeypatch, device, most):
    """The more so on a GPU, where every length costs a graph; short ones differ little there."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    rows = make_rows(range(2, 2049))
    widths = {batch.inputs().shape[1] for batch in iterate_batches(rows, 1, 2049, seed=0)}
    assert len(widths) == most
    assert sorted(widths)[:16] == list(range(32, 513, 32))
    for length in (40, 513, 700, 1990):
        (batch,) = iterate_batches(rows[length - 2 : length - 1], 1, 1990)
        tokens = batch.inputs().shape[1]
        most = largest_batch([rows[length - 2 : length - 1]], 1, 1990)
        assert most == (1, tokens, length - 1, tokens)
        assert length <= tokens + 1 <= 1990 and tokens - length < 128


def test_defect_1_of_mlx_lm_a_padded_row_trains_no_padding_here():
    batch = next(iterate_batches(make_rows([6], offset=2), 1, 64, seed=0))
    assert batch.mask.sum() == 4
    assert 0 not in batch.labels()[batch.mask]
    assert their_mask([2, 6], batch.tokens.shape[1]) == 5


def test_defect_2_of_mlx_lm_rows_are_sorted_by_length_here():
    def padding(batches):
        return sum(int((tokens[:, 1:] == 0).sum()) for tokens in batches)

    rows = make_rows([3, 60] * 20)
    ours = padding(batch.tokens for batch in iterate_batches(rows, 4, 64, seed=0))
    theirs = trainer.iterate_batches(CacheDataset(Raw(rows)), 4, 64, seed=0)
    assert ours < 0.6 * padding(np.array(tokens) for tokens, _ in theirs)


def test_rows_of_one_length_stay_in_their_order():
    rows = make_rows([3, 60] * 500)
    batches = list(iterate_batches(rows, 4, 64, seed=0))
    by_length = sorted(range(1000), key=lambda index: len(rows[index][0]))
    expected = [tuple(by_length[start : start + 4]) for start in range(0, 1000, 4)]
    assert sorted(batch.indices for batch in batches) == sorted(expected)


def test_defect_3_of_mlx_lm_a_prompt_as_long_as_the_limit_is_no_nan_here():
    rows = [*make_rows([20] * 4, offset=5), *make_rows([20] * 4, offset=16, seed=1)]
    dataset = make_dataset(rows, max_seq_length=16)
    assert len(dataset) == 4
    assert all(batch.mask.any(axis=1).all() for batch in iterate_batches(dataset, 2, 16, seed=0))
    tokens, lengths = next(trainer.iterate_batches(rows[4:], 2, 16, seed=0))
    loss, _ = trainer.default_loss(lambda inputs: mx.zeros((*inputs.shape, 99)), tokens, lengths)
    assert np.isnan(loss.item())


def test_a_row_without_a_token_to_train_on_is_refused_at_the_call():
    rows = [*make_rows([9] * 4), ([5], 0)]
    with pytest.raises(EdgeLoraError, match=r"^row 4: has no token to train on within max_seq_le"):
        iterate_batches(rows, 2, 16)
    dataset = make_dataset(make_rows([20] * 4, offset=10), max_seq_length=16)
    with pytest.raises(EdgeLoraError, match=r"^train\.jsonl: line 1: has no token .* 8; leave"):
        iterate_batches(dataset, 2, 8)


def test_fewer_rows_than_a_batch_are_a_smaller_batch():
    for wrap in (list, make_dataset):
        batches = list(iterate_batches(wrap(make_rows([9] * 3)), 4, 16, seed=0))
        assert [sorted(batch.indices) for batch in batches] == [[0, 1, 2]]
        assert count_batches(make_rows([9] * 3), 4, 16, epochs=5) == 5


def test_every_row_is_in_every_epoch_and_the_smaller_batch_is_another_one_each_time():
    """mlx-lm never trains the rows at the end of the file."""
    rows, epochs = make_rows(range(10, 33)), 40
    count = count_batches(rows, 4, 64, epochs)
    assert count == 6 * epochs
    batches = take(iterate_batches(rows, 4, 64, loop=True, seed=5), count)
    smaller = []
    for first in range(0, count, 6):
        epoch = [batch.indices for batch in batches[first : first + 6]]
        assert sorted(sum(epoch, ())) == list(range(23))
        smaller += [indices for indices in epoch if len(indices) < 4]
    assert len(smaller) == epochs and {len(indices) for indices in smaller} == {3}
    assert len(set(smaller)) == 6  # of each length of rows
    theirs = trainer.iterate_batches(CacheDataset(Raw(rows)), 4, 64, loop=True, seed=5)
    seen = {tuple(row) for tokens, _ in take(theirs, count) for row in np.array(tokens).tolist()}
    assert len(seen) == 20


def test_the_share_of_padding():
    rows = make_rows([10, 20, 40])
    assert padding_share(rows, 3, 64) == pytest.approx(1 - 70 / (3 * 64))
    assert padding_share(rows, 1, 65) == pytest.approx(1 - 70 / (33 + 33 + 65))
    assert padding_share(rows, 1, 70, packing=True) == 0
