"""A tiny head, what is true of it, and caches of its neighbours."""

import functools
from contextlib import closing

import mlx.core as mx
import numpy as np

from mlx_edgelora.losses.head import MatrixHead
from mlx_edgelora.losses.neighbours import nearest, row_sum
from mlx_edgelora.model.neighbour_cache import NeighbourCache

VOCABULARY, DIMS, K = 7, 3, 2
SUM_BYTES = 4 * (DIMS + 2)
SLOT_BYTES = 4 * (K + 1)


def matrix(seed=0, vocabulary=VOCABULARY, dims=DIMS):
    return mx.random.normal((vocabulary, dims), key=mx.random.key(seed))


HEAD = MatrixHead(matrix())
ALL = np.arange(VOCABULARY)


@functools.cache
def truth(head=HEAD, k=K):
    """Neighbours of all tokens, and the sums of rows and biases."""
    total = row_sum(head)
    bias = 0.0 if total.bias is None else total.bias.item()
    return np.array(nearest(head, mx.arange(head.vocabulary), k)), np.array(total.weight), bias


def fill(folder, head=HEAD, k=K):
    """A cache of every token, closed; its path."""
    with closing(NeighbourCache(folder, head, k)) as cache:
        cache.build(np.arange(head.vocabulary))
        cache.row_sum()
    return cache.path


def check(cache, head=HEAD, k=K):
    """It gives what is true."""
    near, weight, bias = truth(head, k)
    assert np.array_equal(cache(np.arange(head.vocabulary)), near)
    total = cache.row_sum()
    assert np.array_equal(np.array(total.weight), weight)
    assert total.bias.item() == bias
