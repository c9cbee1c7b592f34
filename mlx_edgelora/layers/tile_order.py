"""Compute tiles one after the other: dependencies between the arrays of tiles."""

import mlx.core as mx

# (start, stop): from the first index up to, and without, `stop`.
Span = tuple[int, int]


def depend_on(arrays: list[mx.array], after: list[mx.array]) -> list[mx.array]:
    """The same arrays, which are computed after `after`, so that one tile is in memory at a time.

    This orders the tiles of a graph. MLX allocates some operations ahead of the one that it runs,
    two or three tiles on a CPU, unless that exceeds its memory limit. The dependency also keeps a
    compiled graph from merging equal operations of forward and backward, whose result it would
    keep in between.
    """
    return mx.depends(arrays, after) if after else arrays
