"""Where the weights of a block come from, as whoever computes one sees it."""

from typing import Protocol

import mlx.core as mx

Arrays = dict[str, mx.array]


class WeightSource(Protocol):
    """Gives a block its frozen weights for one visit."""

    def block(self, index: int, lasting: bool = False) -> Arrays:
        """Arrays by their name inside the block; empty where the block already has them.

        They may be overwritten by later calls (`StreamedWeights`), unless they are to be `lasting`.
        """

    def prefetch(self, index: int) -> None:
        """Begin to read a block that is needed next."""

    def close(self) -> None:
        """Let go of files."""
