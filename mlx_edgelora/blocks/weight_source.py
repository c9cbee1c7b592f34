"""Where the weights of a block come from, as whoever computes one sees it."""

from typing import Protocol

import mlx.core as mx

Arrays = dict[str, mx.array]


class WeightSource(Protocol):
    """Gives a block its frozen weights for one visit."""

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Arrays by their name inside the block; empty where the block already has them.

        Later calls may overwrite them (`StreamedWeights`), unless `own_memory` is set.
        """

    def prefetch(self, index: int) -> None:
        """Begin to read a block that is needed next."""

    def close(self) -> None:
        """Let go of files."""
