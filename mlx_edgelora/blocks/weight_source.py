"""The interface of a source of block weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def reading_once(sources: Sequence[WeightSource]) -> Iterator[None]:
    """Let a block that is asked for several times in a row be read from disk once.

    Memory: what the sources hold of a block anyway, until another one is asked for.

    Args:
        sources: those without an attribute `repeats` read nothing.
    """
    before = [(source, source.repeats) for source in sources if hasattr(source, "repeats")]
    for source, _ in before:
        source.repeats = True
    try:
        yield
    finally:
        for source, repeats in before:
            source.repeats = repeats
