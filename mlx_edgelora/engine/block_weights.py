"""Visits of blocks: their arrays, for as long as they are computed."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import BlockList, Slot, array_slots
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.measure.profile import phase

Arrays = dict[str, mx.array]


class BlockWeights:
    """Brings blocks their arrays.

    Args:
        blocks: of the model.
        weights: where frozen weights come from.
        adapters: where trained parameters come from.

    Attributes:
        slots: of every block, where its arrays hang.
        prefetches: whether the next block's weights are read while one is computed.
    """

    def __init__(self, blocks: BlockList, weights: WeightSource, adapters: WeightSource) -> None:
        self._blocks, self.prefetches = blocks, True
        self.weights, self.adapters = weights, adapters
        self.slots: list[dict[str, Slot]] = []
        self.refresh()

    def refresh(self) -> None:
        """Find out anew which arrays there are, and which are trained."""
        self.slots = [array_slots(block) for block in self._blocks.blocks]
        self._trained = [_trained(block) for block in self._blocks.blocks]

    @property
    def lowest_trained(self) -> int:
        """The lowest block in which something is trained; their number if there is none."""
        return next((i for i, names in enumerate(self._trained) if names), len(self._trained))

    def load(
        self, index: int, next_block: int | None = None, own_memory: bool = False
    ) -> tuple[Arrays, Arrays]:
        """What is trained of a block, and all else that it holds, by name inside it.

        Args:
            index: of the block.
            next_block: the block that is visited next, which is read ahead; None for none.
            own_memory: beyond the second next visit; what is made of them is evaluated before it
                otherwise.
        """
        slots, names = self.slots[index], self._trained[index]
        with phase("load", index):
            frozen, own = self.weights.block(index, own_memory), self.adapters.block(index)
            self.prefetch(next_block)
        held = {name: box[key] for name, (box, key) in slots.items()}
        trained = {name: own.get(name, held[name]) for name in names}
        return trained, {n: frozen.get(n, v) for n, v in held.items() if n not in trained}

    def prefetch(self, next_block: int | None) -> None:
        """Begin to read the weights of the block that is visited next; None for none."""
        if next_block is not None and self.prefetches:
            self.weights.prefetch(next_block)


def _trained(block: nn.Module) -> list[str]:
    return [name for name, _ in tree_flatten(block.trainable_parameters())]
