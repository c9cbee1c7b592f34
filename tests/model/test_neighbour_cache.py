"""Neighbours on disk: computed once, kept by weights and k, never served wrong."""

import os
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from harness import engine, save
from neighbour_helpers import (
    ALL,
    DIMS,
    HEAD,
    SLOT_BYTES,
    SUM_BYTES,
    VOCABULARY,
    K,
    check,
    fill,
    matrix,
    truth,
)

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.head import MatrixHead
from mlx_edgelora.model import neighbour_cache
from mlx_edgelora.model.neighbour_cache import HEADER, NeighbourCache, head_digest

# --- computed once ------------------------------------------------------------------------


def test_only_what_is_asked_for_is_computed_and_only_once(tmp_path, opened, computed):
    cache, counts = opened(tmp_path, HEAD, K), []
    cache.build(np.array([5, 1, 1]), counts.append)
    assert (computed, sum(counts)) == ([1, 5], 2)
    assert np.array_equal(cache(np.array([5, 1])), truth()[0][[5, 1]])
    assert computed == [1, 5]
    cache.build(np.array([1, 5, 6]))
    assert computed == [1, 5, 6]
    assert cache.missing(ALL).tolist() == [0, 2, 3, 4]
    assert np.array_equal(
        cache(np.array([4, 5, 4])), truth()[0][[4, 5, 4]]
    )  # what no build foresaw
    assert computed == [1, 5, 6, 4]
    rows = cache(np.array([1]))
    assert (rows.shape, rows.dtype) == ((1, K), np.int32)


def test_the_next_run_computes_nothing(tmp_path, opened, computed, monkeypatch):
    fill(tmp_path)
    computed.clear()
    monkeypatch.setattr(neighbour_cache, "row_sum", lambda *_: pytest.fail("computed again"))
    cache = opened(tmp_path, HEAD, K, pytest.fail)
    cache.build(ALL)
    check(cache)
    assert computed == []
    assert cache.missing(ALL).size == 0


def test_nothing_asked_for_is_nothing_done(tmp_path, opened, computed):
    cache = opened(tmp_path, HEAD, K)
    cache.build(np.array([], int))
    assert cache(np.array([], int)).shape == (0, K)
    assert computed == []


@pytest.mark.parametrize("k", [1, VOCABULARY])
def test_the_smallest_and_the_largest_k(tmp_path, opened, k):
    check(opened(tmp_path, HEAD, k), k=k)


def test_many_slots_are_looked_at_in_parts(tmp_path, opened, computed, monkeypatch):
    monkeypatch.setattr(neighbour_cache, "SLOTS_BYTES", 2 * SLOT_BYTES)
    cache, counts = opened(tmp_path, HEAD, K), []
    cache.build(ALL, counts.append)
    assert counts == [2, 2, 2, 1]
    check(cache)
    assert computed == ALL.tolist()


def test_sum_of_rows_with_a_bias_is_kept(tmp_path, opened, monkeypatch):
    head = MatrixHead(matrix(), mx.array([0.0, 1, 2, 3, 4, 5, 6.5]))
    check(opened(tmp_path, head, K), head)
    monkeypatch.setattr(neighbour_cache, "row_sum", lambda *_: pytest.fail("computed again"))
    total = opened(tmp_path, head, K).row_sum()
    assert total.bias.item() == 21.5
    assert total.weight.shape == (1, DIMS)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_beyond_the_vocabulary(tmp_path, opened, token):
    cache = opened(tmp_path, HEAD, K)
    for ask in (cache, cache.build, cache.missing):
        with pytest.raises(ValueError, match=f"token: got {token}, expected 0 to 6, the vocab"):
            ask(np.array([3, token]))


@pytest.mark.parametrize("k", [0, -1, VOCABULARY + 1])
def test_k_that_does_not_fit(tmp_path, k):
    with pytest.raises(EdgeLoraError, match=f"^loss_k: got {k}, expected 1 to 7, the size of the"):
        NeighbourCache(tmp_path / "new", HEAD, k)
    assert not (tmp_path / "new").exists()


# --- one file for a head and a k ----------------------------------------------------------


def test_other_weights_and_other_k_have_files_of_their_own(tmp_path, opened):
    one_more = matrix()
    one_more[3, 1] += 1e-6
    heads = [
        HEAD,
        MatrixHead(matrix(1)),
        MatrixHead(one_more),
        MatrixHead(matrix(), mx.zeros((VOCABULARY,))),
        MatrixHead(matrix().astype(mx.float16)),
        MatrixHead(matrix().astype(mx.float16).view(mx.bfloat16)),  # other numbers, same bytes
        MatrixHead(matrix(vocabulary=8)),
        MatrixHead(matrix().reshape(DIMS, VOCABULARY)),
    ]
    caches = [opened(tmp_path, head, k, pytest.fail) for head in heads for k in (1, 2)]
    for cache, (head, k) in zip(caches, [(h, k) for h in heads for k in (1, 2)], strict=True):
        check(cache, head, k)
    assert len({cache.path for cache in caches}) == len(caches) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "4bit"])
def test_where_weights_live_does_not_change_the_file(tmp_path, opened, quantized):
    folder = save(tmp_path / "model", "llama", quantized)
    engines = [engine(folder, streamed=streamed) for streamed in (False, True)]
    first, second = (opened(tmp_path / "cache", e.head, K, pytest.fail) for e in engines)
    assert first.path == second.path
    check(first, engines[0].head)
    assert second.missing(np.arange(101)).size == 0
    for each in engines:
        each.close()


def test_the_digest_reads_by_tiles(tmp_path, memory, monkeypatch):
    class Read(MatrixHead):
        def slice(self, start, stop):
            return {n: mx.array(np.array(a)) for n, a in super().slice(start, stop).items()}

    head = Read(matrix(vocabulary=20_000, dims=64))  # 4.9 MiB
    mx.eval(head.slice(0, 1))
    monkeypatch.setattr(neighbour_cache, "DIGEST_BYTES", 2**18)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    head_digest(head)
    assert mx.get_peak_memory() - before < 2**19


def test_a_file_of_another_model_under_this_name(tmp_path, opened, computed):
    other, path = fill(tmp_path, MatrixHead(matrix(1))), fill(tmp_path)
    path.write_bytes(other.read_bytes())
    refilled(tmp_path, opened, computed, "belongs to another model, or another k")


def test_a_file_of_another_k_under_this_name(tmp_path, opened, computed):
    other, path = fill(tmp_path, k=3), fill(tmp_path)
    other.rename(path)
    refilled(tmp_path, opened, computed, "belongs to another model, or another k")


def refilled(folder, opened, computed, wrong):
    """The file is made anew with a notice, and then is right."""
    computed.clear()
    notices = []
    cache = opened(folder, HEAD, K, notices.append)
    assert notices == [f"{cache.path}: {wrong}; it is rebuilt"]
    check(cache)
    assert computed == ALL.tolist()
    assert opened(folder, HEAD, K, pytest.fail).missing(ALL).size == 0


# --- damage -------------------------------------------------------------------------------


def test_truncated_at_every_length(tmp_path, opened, computed):
    path = fill(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == HEADER.size + SUM_BYTES + VOCABULARY * SLOT_BYTES
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refilled(tmp_path, opened, computed, f"{length} bytes long, expected {len(whole)}")
    path.write_bytes(whole + b"x")
    refilled(tmp_path, opened, computed, f"{len(whole) + 1} bytes long, expected {len(whole)}")


@pytest.mark.slow
def test_every_flipped_bit_is_computed_again(tmp_path, computed):
    """Of header, sum and slots: what is wrong is made again, and nothing else."""
    path = fill(tmp_path)
    whole, slots_at = path.read_bytes(), HEADER.size + SUM_BYTES
    for bit in range(8 * len(whole)):
        at = bit // 8
        path.write_bytes(flipped(whole, bit))
        computed.clear()
        notices = []
        with closing(NeighbourCache(tmp_path, HEAD, K, notices.append)) as cache:
            check(cache)
        assert len(notices) == (at < HEADER.size)
        token = (at - slots_at) // SLOT_BYTES
        expected = [] if at < slots_at else [token]
        assert computed == (ALL.tolist() if at < HEADER.size else expected), bit
        assert path.read_bytes() == whole


def flipped(content, bit):
    result = bytearray(content)
    result[bit // 8] ^= 1 << bit % 8
    return bytes(result)


def test_a_slot_in_the_place_of_another(tmp_path, opened, computed):
    """Its sum of bits is right, its token is not."""
    path = fill(tmp_path)
    content, at = bytearray(path.read_bytes()), HEADER.size + SUM_BYTES
    content[at : at + SLOT_BYTES] = content[at + SLOT_BYTES : at + 2 * SLOT_BYTES]
    path.write_bytes(content)
    computed.clear()
    check(opened(tmp_path, HEAD, K))
    assert computed == [0]


@pytest.mark.parametrize("name", [-1, VOCABULARY, 2**31 - 1])
def test_a_sealed_slot_that_names_no_token(tmp_path, opened, computed, name):
    path = fill(tmp_path)
    content, at = bytearray(path.read_bytes()), HEADER.size + SUM_BYTES + 4 * SLOT_BYTES
    row = np.array([4, name], np.int32)
    content[at : at + SLOT_BYTES] = neighbour_cache._with_checksum(row)
    path.write_bytes(content)
    computed.clear()
    check(opened(tmp_path, HEAD, K))
    assert computed == [4]


def test_damage_while_it_is_open(tmp_path, opened):
    cache = opened(tmp_path, HEAD, K)
    check(cache)
    with open(cache.path, "r+b") as file:
        file.seek(HEADER.size + SUM_BYTES)
        file.write(b"\xff" * 2 * SLOT_BYTES)
    check(cache)


def test_a_disk_that_gives_back_other_bytes(tmp_path, opened, monkeypatch):
    cache = opened(tmp_path, HEAD, K)
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: len(data))
    with pytest.raises(EdgeLoraError, match="the bytes read are not those that were written; cho"):
        cache(ALL)
