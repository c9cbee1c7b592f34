"""Pack rows of a data set into rows of batches: first-fit decreasing in random windows.

Every epoch draws a new order of the rows and divides it into windows. The rows of a window are
taken from the longest to the shortest, and each is put into the first packed row with enough room.
First-fit decreasing makes at most 11/9 of the smallest possible number of packed rows, plus a
constant (Johnson, 1973). In each window at most one packed row is less than half full.
"""

from collections.abc import Sequence

import numpy as np

# Rows of a window. Larger windows pack no better, and the time is quadratic in their size.
WINDOW = 4096


def pack(lengths: np.ndarray, capacity: int, random: np.random.RandomState) -> list[np.ndarray]:
    """Pack rows into rows of `capacity` tokens.

    Args:
        lengths: int [n], tokens of each row; none above `capacity`.
        capacity: tokens of a packed row.
        random: draws the windows.

    Returns:
        For each packed row the indices of its rows, int [k].
    """
    order = random.permutation(len(lengths))
    shared: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        shared += [window[places] for places in _first_fit(lengths[window], capacity)]
    return shared


def _first_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    free = np.full(len(lengths), capacity, np.int64)
    filled: list[list[int]] = []
    for place in np.argsort(-lengths, kind="stable"):
        # The first empty row has enough room for any length.
        row = int(np.argmax(free[: len(filled) + 1] >= lengths[place]))
        if row == len(filled):
            filled.append([])
        filled[row].append(int(place))
        free[row] -= lengths[place]
    return filled


def most_shared(lengths: np.ndarray, capacity: int) -> int:
    """An upper bound of the number of packed rows of `pack`, for any random order."""
    # Two packed rows of a window are together longer than `capacity`, because the first row in
    # the later one did not fit into the earlier one.
    windows = -(-len(lengths) // WINDOW)
    return min(len(lengths), 2 * int(lengths.sum()) // capacity + windows)


def most_labels(lengths: np.ndarray, labels: np.ndarray, room: int) -> int:
    """An upper bound of the number of labelled tokens of a batch.

    Args:
        lengths: int [n], tokens of each row.
        labels: int [n], labelled tokens of each row.
        room: tokens of a batch.
    """
    order = np.argsort(-labels / lengths, kind="stable")
    tokens, found = np.cumsum(lengths[order]), np.cumsum(labels[order])
    whole = int(np.searchsorted(tokens, room, side="right"))
    if whole == len(order):
        return int(found[-1])
    # The row at the end of the batch is counted as a whole.
    return int(found[whole])


def mean_context(lengths: Sequence[int] | np.ndarray) -> int:
    """The length of a token's row, averaged over tokens; attention's cost grows with it."""
    lengths = np.asarray(lengths, np.int64)
    return int(np.ceil((lengths**2).sum() / lengths.sum()))
