"""Visits of blocks: a block's frozen and trained arrays are bound for as long as it is computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_edgelora.memory.profile import phase
from mlx_edgelora.model.blocks import BlockList, array_slots, bound
from mlx_edgelora.model.sources import WeightSource

Arrays = dict[str, mx.array]


class Visits:
    """Brings blocks their arrays.

    Args:
        blocks: of the model.
        weights: where frozen weights come from.
        adapters: where trained parameters come from.

    Attributes:
        prefetches: whether the next block's weights are read while one is computed.
    """

    def __init__(self, blocks: BlockList, weights: WeightSource, adapters: WeightSource) -> None:
        self._blocks, self.prefetches = blocks, True
        self.weights, self.adapters = weights, adapters

    def arrays(self, index: int, following: int | None, without: str = "") -> Arrays:
        """All that is bound to a block for a visit.

        Args:
            index: of the block.
            following: the block that is visited next, which is read ahead; None for none.
            without: a child of the block that is not computed in this visit.
        """
        with phase("load", index):
            arrays = self.weights.block(index, without) | self.adapters.block(index, without)
            self.read_ahead(following)
            mx.eval(arrays)
        return arrays

    def read_ahead(self, following: int | None) -> None:
        """Begin to read the block that is visited next."""
        if following is not None and self.prefetches:
            self.weights.prefetch(following)

    @contextmanager
    def bound(self, index: int, following: int | None, without: str = "") -> Iterator[Arrays]:
        """Bind a block's arrays for a visit; gives those that are trained in it."""
        block, arrays = self._blocks.blocks[index], self.arrays(index, following, without)
        own = [
            (name, value)
            for name, value in tree_flatten(block.trainable_parameters())
            if not without or not name.startswith(f"{without}.")
        ]
        with bound(array_slots(block), arrays):
            yield {name: arrays.get(name, value) for name, value in own}
