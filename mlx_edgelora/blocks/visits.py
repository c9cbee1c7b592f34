"""Parts of a block that are computed apart from its graph: their weights are read piece by piece.

A gated MLP can be such a part (`blocks/gated_mlp.py`). A visit reads a piece of its weights,
computes with it and drops it, so it is evaluated at once and must not be traced
(`engine/visited_gradients.py`). Layers of experts are computed apart as well, but for all tiles at
once (`engine/expert_gradients.py`); a block that has them has no such part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.apart import PartCalls

Arrays = dict[str, mx.array]


class RowSource(Protocol):
    """Reads parts of a block's tensors that `block` leaves out."""

    def start_rows(
        self, index: int, names: Sequence[str], rows: Sequence[int]
    ) -> Callable[[], Arrays] | None:
        """Begin to read rows of tensors; None if the block's arrays are in memory.

        Returns:
            A function that waits for them and returns them by name.
        """


@dataclass(frozen=True)
class Place:
    """Where a part is; equal texts for all blocks, because they share functions."""

    source: RowSource | None = field(repr=False)
    index: int = field(repr=False)
    path: str = field(repr=False)


class VisitedCall(Protocol):
    """A call of a part.

    Attributes:
        x: input [n, d].
        adapters: trained arrays by name in the part.
        out_shape: shape of the output.
    """

    x: mx.array
    adapters: Arrays
    out_shape: tuple[int, ...]

    def inputs(self) -> list[mx.array]:
        """The arrays that are evaluated before a visit."""

    def forward(self) -> mx.array:
        """The output, evaluated."""

    def backward(self, dy: mx.array, sums: Arrays) -> mx.array:
        """The gradient of `x`, evaluated.

        Args:
            dy: gradient of the output.
            sums: evaluated float32 arrays like `adapters`, to which their gradients are added in
                place.
        """


VISITS = PartCalls[VisitedCall]("MLP")


def has_visits(block: nn.Module) -> bool:
    """Whether a part of a block is computed by visits."""
    return any(getattr(module, "is_visited", False) for module in block.modules())


def visited_adapters(block: nn.Module) -> list[str]:
    """Local names of the trained arrays of the parts that are computed by visits."""
    return [
        f"{path}.{name}"
        for path, module in block.named_modules()
        if getattr(module, "is_visited", False)
        for name in module.adapters()
    ]
