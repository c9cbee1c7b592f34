"""What the segments of a pass share, and what a segment is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.engine.block_weights import Arrays, BlockWeights
from mlx_edgelora.engine.functions import BlockFunctions
from mlx_edgelora.engine.hidden import Hidden, Slots
from mlx_edgelora.engine.pipeline import Pipeline


@dataclass(frozen=True)
class Context:
    """What the segments of a pass share.

    Attributes:
        weights: bring blocks their arrays.
        functions: blocks as functions of them.
        pipeline: evaluates what they compute.
        slots: of the store in which hidden states wait.
        spans: the tiles of tokens in which they do.
        first: the lowest block that is differentiated.
        entry: whether the gradient goes on to what lies before the blocks.
    """

    weights: BlockWeights
    functions: BlockFunctions
    pipeline: Pipeline
    slots: Slots
    spans: Sequence[TokenSpan]
    first: int
    entry: bool

    def needs_input_grad(self, index: int) -> bool:
        """Whether the gradient of a block's input is needed."""
        return index > self.first or self.entry

    def store(self, x: Hidden) -> Hidden:
        """Hidden states in the store."""
        return x.cut(self.spans, self.slots)

    def to_next_segment(self, array: mx.array) -> Hidden:
        """The same for the next segment: in tiles, if tokens are cut at all, or in memory."""
        return Hidden(array) if len(self.spans) == 1 else self.store(Hidden(array))


class Segment(Protocol):
    """One block, computed in one way, from its forward to its backward.

    Attributes:
        index: of the block.
    """

    index: int

    def forward(self, x: Hidden, next_block: int | None) -> Hidden:
        """What the block makes of its input, which is used up.

        Args:
            x: the input.
            next_block: the block whose weights are needed next; None for none.
        """
        ...

    def backward(
        self, dy: Hidden, prefetch_next: Callable[[], int | None]
    ) -> tuple[Hidden | None, Arrays]:
        """The gradient of the input, if it is needed, and those of what is trained, by local name.

        Args:
            dy: the gradient of what `forward` gave; used up.
            prefetch_next: called when the block's own input is there: begins to read what the next
                segment needs, and gives its block.
        """
        ...

    def prefetch(self) -> int | None:
        """Begin to bring back what `backward` needs; gives the block whose weights it reads."""
        ...
