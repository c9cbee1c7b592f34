"""The arrays of blocks, loaded for the time that a block is computed."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import BlockList, Slot, array_slots
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.measure.profile import phase

Arrays = dict[str, mx.array]


class BlockWeights:
    """Loads the arrays of blocks.

    Args:
        blocks: the model's blocks.
        weights: source of frozen weights.
        adapters: source of trained parameters.

    Attributes:
        slots: for every block, the places of its arrays.
        prefetches: whether the next block's weights are read while a block is computed.
    """

    def __init__(self, blocks: BlockList, weights: WeightSource, adapters: WeightSource) -> None:
        self._blocks, self.prefetches = blocks, True
        self.weights, self.adapters = weights, adapters
        self.slots: list[dict[str, Slot]] = []
        self.refresh()

    def refresh(self) -> None:
        """Look up the arrays of the blocks, and which are trained, again."""
        self.slots = [array_slots(block) for block in self._blocks.blocks]
        self._trained = [_trained(block) for block in self._blocks.blocks]

    @property
    def lowest_trained(self) -> int:
        """Index of the lowest block with trained arrays; the number of blocks if there is none."""
        return next((i for i, names in enumerate(self._trained) if names), len(self._trained))

    def load(
        self, index: int, next_block: int | None = None, own_memory: bool = False
    ) -> tuple[Arrays, Arrays]:
        """The trained arrays of a block and its other arrays, by local name.

        Args:
            index: index of the block.
            next_block: index of the block to prefetch, or None.
            own_memory: whether the arrays must stay valid. Otherwise their memory is reused after
                a few calls, and everything computed from them must be evaluated before.
        """
        slots, names = self.slots[index], self._trained[index]
        with phase("load", index):
            frozen, own = self.weights.block(index, own_memory), self.adapters.block(index)
            self.prefetch(next_block)
        held = {name: box[key] for name, (box, key) in slots.items()}
        trained = {name: own.get(name, held[name]) for name in names}
        return trained, {n: frozen.get(n, v) for n, v in held.items() if n not in trained}

    def prefetch(self, next_block: int | None) -> None:
        """Start reading the weights of a block; None for none."""
        if next_block is not None and self.prefetches:
            self.weights.prefetch(next_block)


def _trained(block: nn.Module) -> list[str]:
    return [name for name, _ in tree_flatten(block.trainable_parameters())]
