"""One tile after the other: what a tile waits for, and an evaluation that stops at each.

`wait` puts an order into a graph, which bounds what is needed at a time, not what is
allocated: MLX allocates about 50 operations ahead of what it runs, which is two or three tiles.
An evaluation that stops where a tile waits for the one before has one tile in memory.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_recording: list["Stops"] = []


class Stops:
    """Arrays at which an evaluation of a graph can stop, in the order of its tiles."""

    def __init__(self) -> None:
        self._stops: list[list[mx.array]] = []

    def add(self, arrays: list[mx.array]) -> None:
        """Stop at these; as they are, whatever is written into them later."""
        self._stops.append([copy.copy(array) for array in arrays])

    def clear(self) -> None:
        """Forget the stops so far: nobody may need what lies before them."""
        self._stops.clear()

    def eval(self) -> None:
        """Evaluate up to one stop after the other; what is only needed between two is freed."""
        self._stops.reverse()
        while self._stops:
            mx.eval(self._stops.pop())


@contextmanager
def stops() -> Iterator[Stops]:
    """Collect the stops of the graphs that are built inside.

    To be evaluated outside of traces, and only if all of the graphs is needed, or else
    what is not needed is computed as well.
    """
    found = Stops()
    _recording.append(found)
    try:
        yield found
    finally:
        _recording.remove(found)


def stop(arrays: list[mx.array]) -> None:
    """Let an evaluation stop here, if anybody collects."""
    if _recording:
        _recording[-1].add(arrays)


def forget_stops() -> None:
    """Drop the stops so far: what follows may not need all that lies before them."""
    if _recording:
        _recording[-1].clear()


def wait(arrays: list[mx.array], after: list[mx.array]) -> list[mx.array]:
    """The same arrays, usable when `after` is there, so that one tile is needed at a time.

    A compiled graph also cannot merge what a backward makes from them with the same thing in
    the forward, and keep that in between.
    """
    if not after:
        return arrays
    stop(after)
    return mx.depends(arrays, after)
