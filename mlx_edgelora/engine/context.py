"""The interface of a segment, and the objects that the segments of a pass share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.engine.block_weights import Arrays, BlockWeights
from mlx_edgelora.engine.functions import BlockFunctions
from mlx_edgelora.engine.hidden import Hidden, Slots
from mlx_edgelora.engine.pipeline import Pipeline
from mlx_edgelora.engine.shared import SharedOutputs


@dataclass(frozen=True)
class Context:
    """The objects that the segments of a pass share.

    Attributes:
        weights: loads the arrays of a block.
        functions: computes blocks as functions of their arrays.
        pipeline: evaluates the results.
        slots: slots of the store that keeps hidden states until the backward.
        spans: tiles of tokens in which hidden states are stored.
        first: index of the lowest block that is differentiated.
        entry: whether the gradient of the first block's input is needed as well.
        shared: what blocks return for later ones besides hidden states.
        key_tokens: see `Plan.key_tokens`; None if hidden states stay in memory.
    """

    weights: BlockWeights
    functions: BlockFunctions
    pipeline: Pipeline
    slots: Slots
    spans: Sequence[TokenSpan]
    first: int
    entry: bool
    shared: SharedOutputs
    key_tokens: int | None = None

    def needs_input_grad(self, index: int) -> bool:
        """Whether the gradient of a block's input is needed."""
        return index > self.first or self.entry

    def store(self, x: Hidden) -> Hidden:
        """Move hidden states into the store."""
        return x.cut(self.spans, self.slots)

    def to_next_segment(self, array: mx.array) -> Hidden:
        """Prepare an array for the next segment: in tiles in the store, or as one array."""
        return Hidden(array) if len(self.spans) == 1 else self.store(Hidden(array))


class Segment(Protocol):
    """One block, computed in one way, from its forward to its backward.

    Attributes:
        index: index of the block.
    """

    index: int

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """Compute the block's output; the input is consumed.

        Args:
            x: input, hidden states [B, T, D].
            next_block: index of the block whose weights are needed next, or None.
        """
        ...

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """Compute the gradient of the input, if needed, and those of the trained arrays by name.

        Args:
            dy: gradient of the output of `forward`; consumed.
            prefetch_next: called once the block's own input is loaded; starts the reads of the
                next segment and returns the index of its block.
        """
        ...

    def prefetch(self) -> int | None:
        """Start the reads that `backward` needs; return the block whose weights it reads."""
        ...
