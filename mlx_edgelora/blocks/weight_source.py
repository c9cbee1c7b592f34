"""The interface of a source of block weights."""

from typing import Protocol

import mlx.core as mx

Arrays = dict[str, mx.array]


class WeightSource(Protocol):
    """Provides the arrays of a block each time that it is computed."""

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Arrays by local name; empty if they are in the model already.

        Later calls may overwrite them (`StreamedWeights`), unless `own_memory` is set.
        """

    def prefetch(self, index: int) -> None:
        """Start reading the block that is needed next."""

    def close(self) -> None:
        """Close files."""
