"""Record the arguments of all blocks: run the model's loop once with blocks that do nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.outputs import Link, links_of
from mlx_edgelora.blocks.refusals import Refusal
from mlx_edgelora.errors import EdgeLoraError


@dataclass
class BlockCall:
    """The arguments of a block other than its input.

    Attributes:
        args, kwargs: the arguments, with stand-ins for what earlier blocks return.
        keys: the keys that its dropout drew.
        links: what it reads of earlier blocks, besides its input.
    """

    args: tuple
    kwargs: dict
    keys: list[mx.array] = field(default_factory=list)
    links: list[Link] = field(init=False)

    def __post_init__(self) -> None:
        """Find the links."""
        self.links = links_of(self.args, self.kwargs)


class _LoopEnded(Exception):
    """Ends the model's loop at a block."""


def record(blocks: BlockList, run: Callable[[], Any]) -> tuple[mx.array, list[BlockCall]]:
    """The first block's input, lazy, and the call of every block.

    Each block returns an array of its input's shape that is never computed. The order of blocks
    and their inputs are checked again, because a loop may behave differently than with the tokens
    of `check_walk`.

    Args:
        blocks: the model's blocks.
        run: calls the model, directly or inside a loss; stopped at the last block.

    Raises:
        EdgeLoraError: blocks are not called once and in order, or not at all.
    """
    calls: list[BlockCall] = []
    first: list[mx.array] = []
    returned: list[mx.array] = []

    def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        if index != len(calls):
            raise blocks.refusal(index, Refusal.ORDER, due=str(len(calls)))
        if index and x is not returned[-1]:
            raise blocks.refusal(index, Refusal.INPUT)
        calls.append(BlockCall(args, kwargs))
        if index == 0:
            first.append(x)
        if index + 1 == len(blocks):
            raise _LoopEnded
        returned[:] = [mx.zeros(x.shape, x.dtype)]
        return returned[0]

    try:
        with blocks.intercept(handler):
            run()
    except _LoopEnded:
        return first[0], calls
    if calls:
        raise blocks.refusal(len(calls), Refusal.NOT_CALLED)
    raise EdgeLoraError(
        "value_and_grad: the loss returned without calling the model, expected one call; "
        "call the model given to value_and_grad inside the loss"
    )


def first_input(blocks: BlockList, run: Callable[[], Any]) -> mx.array:
    """The first block's input; the model's loop is stopped there."""
    found: list[mx.array] = []

    def handler(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        found.append(x)
        raise _LoopEnded

    try:
        with blocks.intercept(handler):
            run()
    except _LoopEnded:
        pass
    return found[0]
