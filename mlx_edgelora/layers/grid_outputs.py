"""What tiles of attention (`layers/grid.py`) give: outputs, and gradients as sums over tiles."""

import mlx.core as mx

from mlx_edgelora.layers.tile_order import Span


class HeadBuffer:
    """An array like `like` but for its last axis, filled by [heads, rows, size] in turn."""

    def __init__(self, like: mx.array, size: int, dtype: mx.Dtype | None = None) -> None:
        self.shape = (*like.shape[:3], size)
        flat = (self.shape[0] * self.shape[1], *self.shape[2:])
        self.whole = mx.zeros(flat, dtype or like.dtype)
        self.filled = 0

    def add(self, pieces: list[mx.array], wait: bool) -> mx.array:
        """Write the next heads, given in pieces of rows; returns the array to depend on."""
        heads = mx.concatenate(pieces, axis=1).astype(self.whole.dtype)
        self.whole[self.filled : self.filled + len(heads)] = heads
        self.filled += len(heads)
        return self.whole if wait else heads

    def result(self) -> mx.array:
        """The filled array."""
        return self.whole.reshape(self.shape)


class UnitSums:
    """Sums of dK and dV over the rows of some heads, for each tile of keys.

    Args:
        heads: number of key heads.
        key_tiles: the tiles.
        sizes: sizes of a key and of a value.
    """

    def __init__(self, heads: int, key_tiles: list[Span], sizes: tuple[int, int]) -> None:
        self._sums = [
            {keys: mx.zeros((heads, keys[1] - keys[0], size)) for keys in key_tiles}
            for size in sizes
        ]

    def add(self, index: int, keys: Span, more: mx.array) -> mx.array:
        """Add to the sum of a tile of keys, of dK (0) or dV (1)."""
        self._sums[index][keys] = self._sums[index][keys] + more
        return self._sums[index][keys]

    def parts(self) -> list[list[mx.array]]:
        """The pieces of dK and of dV."""
        return [list(of_tiles.values()) for of_tiles in self._sums]


class MaskGradient:
    """The gradient of a floating mask [B or 1, H or 1, Tq or 1, Tk or 1], tile by tile.

    Where an axis of the mask was broadcast tiles are summed, else they are put side by side.
    Memory: twice the mask in float32, for the moment of the last concatenation.
    """

    def __init__(self, mask: mx.array) -> None:
        self._shared = [size == 1 for size in mask.shape]
        self._parts: list[list[mx.array]] = [[], [], [], []]  # of an axis, not joined yet

    def add(self, tile: mx.array) -> mx.array:
        """Add the gradient [heads, rows, keys] of one tile's scores; returns the array kept."""
        shared = [axis for axis in (1, 2, 3) if self._shared[axis]]
        part = tile[None].sum(shared, keepdims=True) if shared else tile[None]
        self._put(3, part)
        return self._parts[3][-1]

    def end(self, axis: int) -> None:
        """Join the tiles along an axis (batch, heads, rows or keys), which are complete."""
        parts, self._parts[axis] = self._parts[axis], []
        whole = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)
        self._put(axis - 1, whole)

    def result(self) -> mx.array:
        """The whole gradient."""
        parts = self._parts[0]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _put(self, axis: int, part: mx.array) -> None:
        parts = self._parts[axis]
        if parts and self._shared[axis]:
            parts[0] = parts[0] + part
        else:
            parts.append(part)
