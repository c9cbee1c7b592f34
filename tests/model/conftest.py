import pytest

from mlx_edgelora.losses.neighbours import nearest
from mlx_edgelora.model import neighbour_cache
from mlx_edgelora.model.neighbour_cache import NeighbourCache


@pytest.fixture
def computed(monkeypatch):
    """The tokens whose neighbours are computed, in order."""
    tokens = []

    def spy(head, some, *rest):
        tokens.extend(some.tolist())
        return nearest(head, some, *rest)

    monkeypatch.setattr(neighbour_cache, "nearest", spy)
    return tokens


@pytest.fixture
def opened():
    """opened(...) -> a cache that is closed after the test."""
    caches = []

    def make(*args):
        caches.append(NeighbourCache(*args))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
