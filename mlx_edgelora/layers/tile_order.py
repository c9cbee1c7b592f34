"""One tile after the other: what a tile waits for."""

import mlx.core as mx

# From the first number to the one behind the last.
Span = tuple[int, int]


def depend_on(arrays: list[mx.array], after: list[mx.array]) -> list[mx.array]:
    """The same arrays, usable when `after` is there, so that one tile is needed at a time.

    That puts an order into a graph. MLX allocates some operations ahead of what it runs, two or
    three tiles on a CPU, unless that exceeds its memory limit: it waits there. A compiled graph
    also cannot merge what a backward makes from them with the same thing in the forward, and
    keep that in between.
    """
    return mx.depends(arrays, after) if after else arrays
