"""Few combinations of parameters, in which every two values come together."""

from collections.abc import Iterable
from itertools import combinations, product


def pairwise(*parameters: Iterable) -> list[tuple]:
    """Combinations of one value of each parameter; each two values of two of them are in one.

    Nearly as few as the two longest ones need, where the product would have all of them.
    """
    values = [list(parameter) for parameter in parameters]
    rows = {row: pairs(row) for row in product(*(range(len(found)) for found in values))}
    left, chosen = set().union(*rows.values()), []
    while left:
        best = max(rows, key=lambda row: len(left & rows[row]))
        left -= rows.pop(best)
        chosen.append(tuple(found[i] for found, i in zip(values, best, strict=True)))
    return chosen


def pairs(row: tuple[int, ...]) -> set:
    return set(combinations(enumerate(row), 2))
