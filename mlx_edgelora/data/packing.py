"""Which rows share a row of a batch: first-fit decreasing, in windows of rows drawn at random.

Every epoch draws another order of the rows and cuts it into windows. In a window the rows are
taken from the longest to the shortest, and each goes into the first row that still has room for
it. First-fit decreasing needs at most 11/9 of the least number of rows, and one (Johnson, 1973);
of a window at most one row is less than half full.
"""

from collections.abc import Sequence

import numpy as np

# Rows of a window: more fill rows no better, and each row looks at all that were begun.
WINDOW = 4096


def pack(lengths: np.ndarray, capacity: int, random: np.random.RandomState) -> list[np.ndarray]:
    """Groups of rows that share a row.

    Args:
        lengths: int [n], tokens of each row, none above `capacity`.
        capacity: tokens of a shared row.
        random: draws which rows are in one window.

    Returns:
        For each shared row the indices of its rows, int [k].
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
        # The first row that was not begun has room for any.
        row = int(np.argmax(free[: len(filled) + 1] >= lengths[place]))
        if row == len(filled):
            filled.append([])
        filled[row].append(int(place))
        free[row] -= lengths[place]
    return filled


def most_shared(lengths: np.ndarray, capacity: int) -> int:
    """The most shared rows that `pack` makes, whatever is drawn."""
    # Of two shared rows of a window the later one begins with what the earlier had no room for.
    windows = -(-len(lengths) // WINDOW)
    return min(len(lengths), 2 * int(lengths.sum()) // capacity + windows)


def most_labels(lengths: np.ndarray, labels: np.ndarray, room: int) -> int:
    """No batch of so many tokens holds more labels.

    Args:
        lengths: int [n], tokens of each row.
        labels: int [n], how many of them are labelled.
        room: tokens of a batch.
    """
    order = np.argsort(-labels / lengths, kind="stable")
    tokens, found = np.cumsum(lengths[order]), np.cumsum(labels[order])
    whole = int(np.searchsorted(tokens, room, side="right"))
    if whole == len(order):
        return int(found[-1])
    # The next row counts as if it were cut where the batch ends.
    return int(found[whole])


def mean_context(lengths: Sequence[int] | np.ndarray) -> int:
    """Tokens of the row that a token is in, averaged over tokens: what attention costs by."""
    lengths = np.asarray(lengths, np.int64)
    return int(np.ceil((lengths**2).sum() / lengths.sum()))
