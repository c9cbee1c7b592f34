"""The walk inside of blocks: which are computed by tiles of tokens, in halves, and how."""

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_edgelora.memory.meter import give_back
from mlx_edgelora.memory.profile import phase
from mlx_edgelora.memory.stores import ActivationStore
from mlx_edgelora.memory.streams import Sums
from mlx_edgelora.memory.tiled_pass import TiledPass
from mlx_edgelora.memory.tiles import TiledBlock
from mlx_edgelora.memory.visits import Arrays, Visits
from mlx_edgelora.model.blocks import BlockList, array_slots
from mlx_edgelora.model.parts import BlockParts
from mlx_edgelora.model.tiling import Tileable, Tiling


@dataclass
class Call:
    """What a block was called with, beside its input, and the keys its dropout drew."""

    args: tuple
    kwargs: dict
    keys: list[mx.array] = field(default_factory=list)


class TiledWalk:
    """Computes blocks for some tokens at a time.

    Args:
        blocks: of the model.
        visits: bring them their arrays.
        tiling: tells which can be computed so.
        tile_tokens: tokens of a tile, over all rows of a batch.
        halves: compute attention and MLP of a block apart where it is a sum of the two, keep
            what lies between as well, and bind one half's weights at a time.
    """

    def __init__(
        self, blocks: BlockList, visits: Visits, tiling: Tiling, tile_tokens: int, halves: bool
    ) -> None:
        self._blocks, self._visits, self._tiling = blocks, visits, tiling
        self._tile_tokens, self._halves = tile_tokens, halves

    def __str__(self) -> str:
        return f"{self._tile_tokens} tokens at a time in {self._tiling.summary()}"

    def choices(self) -> list[Tileable]:
        """How each block is computed; not inside an intercepted call."""
        return [self._tiling.of(index) for index in range(len(self._blocks))]

    def cuts(self, tokens: int) -> bool:
        """Whether a batch of so many tokens, over all rows, is computed by tiles or in halves."""
        return self._halves or tokens > self._tile_tokens

    def begin(
        self, x: mx.array, store: ActivationStore, first: int, choices: list[Tileable]
    ) -> TiledPass | None:
        """A pass by tiles; None where there is nothing to gain.

        Args:
            x: the first block's input, [B, T, D].
            store: where tiles wait.
            first: the lowest block that is differentiated.
            choices: of this pass.
        """
        if not self.cuts(x.size // x.shape[-1]):
            return None
        keys = max(choice.keys for choice in choices)
        count = len(self._blocks)
        return TiledPass(self._tile_tokens, x, store, first, count, self._halves, keys)

    def forward(self, tiles: TiledPass, index: int, call: Call, choice: Tileable) -> None:
        """Compute a block that can be computed by tiles."""
        following = index + 1 if index + 1 < len(self._blocks) else None
        tiled = self._block(tiles, index, call, choice)
        attention, mlp = tiled.parts.branches or ("", "")
        first = self._visits.bound(index, None if mlp else following, without=mlp)
        with first, phase("forward", index):
            tiles.forward(index, tiled)
        if mlp:
            second = self._visits.bound(index, following, without=attention)
            with second, phase("forward", index):
                tiles.forward_rest(index, tiled)
        give_back()

    def backward(
        self,
        tiles: TiledPass,
        index: int,
        call: Call,
        choice: Tileable,
        following: int | None,
        onward: bool,
    ) -> Arrays:
        """Differentiate it; gives the gradients of what is trained, by name inside the block.

        Args:
            following: the block that is differentiated next, None for none.
            onward: whether the gradient of the block's input is needed.
        """
        tiled = self._block(tiles, index, call, choice)
        attention, mlp = tiled.parts.branches or ("", "")
        sums = Sums()
        if mlp:
            first = self._visits.bound(index, None, without=attention)
            with first as trained, phase("recompute", index):
                tiles.backward_rest(index, tiled, sums.of(trained))
            give_back()
        second = self._visits.bound(index, following, without=mlp)
        with second as trained, phase("recompute", index):
            tiles.backward(index, tiled, sums.of(trained), onward)
        give_back()
        return sums.totals()

    def _block(self, tiles: TiledPass, index: int, call: Call, choice: Tileable) -> TiledBlock:
        block = self._blocks.blocks[index]
        branches = choice.branches if self._halves else None
        parts = BlockParts(block, call.args, call.kwargs, branches, choice.through_cache)
        return tiles.block(index, parts, array_slots(block))
