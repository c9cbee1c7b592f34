"""What is kept for each tile of tokens: spans and places, streams of arrays, sums of gradients."""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_edgelora.model.parts import Picked, Place, Span


class Stream(Protocol):
    """Keeps an evaluated array for each number, in memory or on disk."""

    def put(self, number: int, array: mx.array) -> None:
        """Keep an array in place of the one that was there."""

    def get(self, number: int) -> mx.array:
        """Give it; it stays."""

    def forget(self, number: int) -> None:
        """Let go of it, if it is there."""


def spans_of(tokens: int, size: int) -> list[Span]:
    """Cut the tokens of a row into tiles of nearly one length, `size` at most."""
    count = -(-tokens // size)
    step = -(-tokens // count)
    return [Span(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def places_of(spans: Sequence[Span], rows: np.ndarray | None, tokens: int) -> list[list[Place]]:
    """Which tokens of each tile a block is computed for: all, or those of some rows.

    Args:
        spans: the tiles.
        rows: int [n], ascending, of the batch * tokens rows; None for all.
        tokens: of a row of the batch.
    """
    if rows is None:
        return [[span] for span in spans]
    batch, positions = np.divmod(rows.astype(np.int32), tokens)
    result: list[list[Place]] = []
    for span in spans:
        inside = (positions >= span.start) & (positions < span.stop)
        found = [(row, positions[inside & (batch == row)]) for row in np.unique(batch[inside])]
        result.append([Picked(int(row), where) for row, where in found])
    return result


class Sums:
    """Sums of gradients of a block's trained arrays over its tiles.

    Attributes:
        values: the trained arrays of this visit.
    """

    def __init__(self) -> None:
        self.values: dict[str, mx.array] = {}
        self._specs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
        self._totals: dict[str, mx.array] = {}

    def of(self, values: dict[str, mx.array]) -> "Sums":
        """The same sums, for another visit."""
        self.values = values
        self._specs |= {name: (value.shape, value.dtype) for name, value in values.items()}
        return self

    def add(self, names: list[str], gradients: list[mx.array]) -> None:
        """Add evaluated gradients."""
        for name, value in zip(names, gradients, strict=True):
            self._totals[name] = self._totals[name] + value if name in self._totals else value
        mx.eval([self._totals[name] for name in names])

    def totals(self) -> dict[str, mx.array]:
        """Sums of all visits' arrays; zeros where nothing was added."""
        zeros = {n: mx.zeros(*spec) for n, spec in self._specs.items() if n not in self._totals}
        mx.eval(zeros)
        return {name: self._totals.get(name, zeros.get(name)) for name in self._specs}


class KeySums:
    """Sums of the gradients of keys and values over tiles of queries, float32, by tile of keys.

    Args:
        stream: keeps the two sums of tile i under 2 i and 2 i + 1.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._there: set[int] = set()

    def add(self, index: int, row: slice, pair: list[mx.array], batch: int) -> None:
        """Add gradients [b, Hkv, t, D] of the keys and values of a tile, of `batch` rows' some.

        They are taken out of `pair`.
        """
        there = index in self._there
        for number in range(2):  # one after the other: of both there would be twice as much
            more = mx.contiguous(pair[number].astype(mx.float32))
            pair[number] = None
            if there:
                total = self._stream.get(2 * index + number)
            elif more.shape[0] < batch:
                total = mx.zeros((batch, *more.shape[1:]))
            else:
                total = None
            if total is None:
                total = more
            elif more.shape[0] == batch:
                total = total + more
            else:
                total[row] = total[row] + more
            del more
            mx.eval(total)
            self._stream.put(2 * index + number, total)
            del total
        self._there.add(index)

    def take(self, index: int) -> list[mx.array] | None:
        """Both sums of a tile, which are forgotten; None if nothing was added."""
        if index not in self._there:
            return None
        self._there.remove(index)
        numbers = (2 * index, 2 * index + 1)
        pair = [self._stream.get(number) for number in numbers]
        for number in numbers:
            self._stream.forget(number)
        return pair


def joined(pieces: list[mx.array]) -> mx.array:
    """What belongs to the places of one tile as one evaluated array."""
    if len(pieces) == 1:
        return pieces[0]
    whole = mx.concatenate(pieces)
    mx.eval(whole)
    return whole


def split(whole: mx.array, places: list[Place]) -> list[mx.array]:
    """What `joined` put together."""
    if len(places) == 1:
        return [whole]
    stops = np.cumsum([place.positions.size for place in places])
    return mx.split(whole, stops[:-1].tolist())


def spread(pieces: list[mx.array], places: list[Place], tile: mx.array, start: int) -> mx.array:
    """The gradients at a tile's places as one evaluated array of the tile."""
    if places and isinstance(places[0], Span):
        return pieces[0]
    whole = mx.zeros_like(tile)
    for piece, place in zip(pieces, places, strict=True):
        whole[place.row, mx.array(place.positions - start)] = piece[:, 0]
    mx.eval(whole)
    return whole


def flat_places(places: list[list[Place]], pieces: list[list[Any]]) -> list[Any]:
    """Pieces by tile and place in the order of the batch's rows: row by row, tile by tile."""
    keyed = [
        (place.row if isinstance(place, Picked) else 0, index, piece)
        for index, (some, found) in enumerate(zip(places, pieces, strict=True))
        for place, piece in zip(some, found, strict=True)
    ]
    return [piece for _, _, piece in sorted(keyed, key=lambda item: item[:2])]
