"""What parts of a step took on this machine, at the shapes of runs: bytes and seconds.

They are measured with a few blocks before a run's first step (`training/sampling.py`) and kept in
a file per machine, versions and model. A formula (`planner/needs.py`) stands in for what was not
measured; what was measured of something like it says how much larger or smaller that is here.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.storage.files import write_atomically

# Of the file: raise it when its numbers mean something else, or the engine takes another amount.
VERSION = 4
# Of each kind of phase, what names a way to compute it (`cost.ways_of`).
BLOCK = ("forward", "backward", "tiles forward", "tiles backward")
LENGTHS = dict.fromkeys(BLOCK, 5) | {"load": 0, "head": 2, "tail": 5, "update": 1}
# So many models are remembered.
MODELS = 64
# How much more may be needed than is said: of what was measured as it is, of what was measured
# with other tokens or another way, and of what is a formula's. See docs/planner.md.
KNOWN, LIKELY, UNKNOWN = 1.08, 1.2, 1.35

Way = tuple[object, ...]


@dataclass(frozen=True)
class Measurement:
    """What something took: bytes beside what is accounted for, and seconds."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What is expected, and by how much it may be more."""

    value: float
    spread: float


@dataclass
class Measurements:
    """Everything that is known of one model on one machine.

    Attributes:
        file: where it is kept; None for nowhere.
        key: of machine, versions and model in this file.
        overlaps: whether the next segment is built while one is computed, on a GPU.
        correction: what expected peaks are multiplied by, from a whole step that was measured.
    """

    file: Path | None = None
    key: str = ""
    overlaps: bool = False
    correction: float = 1.0
    _known: dict[str, dict[Way, dict[BatchShape, Measurement]]] = field(default_factory=dict)
    _count: int = 0
    _paced: int = 0
    _pace: float = 1.0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known."""
        return not self._known

    def add(self, kind: str, way: Way, batch_shape: BatchShape, taken: Measurement) -> None:
        """Remember what one thing took."""
        self._known.setdefault(kind, {}).setdefault(way, {})[batch_shape] = taken
        self._count += 1

    def find(self, kind: str, way: Way, batch_shape: BatchShape) -> Measurement | None:
        """What was measured of exactly this; of a tail of so many blocks, of shorter ones."""
        ways = self._known.get(kind, {})
        found = ways.get(way, {}).get(batch_shape)
        if found is not None or kind != "tail":
            return found
        known = sorted(
            w[0]
            for w, batch_shapes in ways.items()
            if w[1:] == way[1:] and batch_shape in batch_shapes
        )
        if len(known) < 2:
            return None
        few, many = known[0], known[-1]
        low, high = (ways[(count, *way[1:])][batch_shape] for count in (few, many))
        more = (way[0] - few) / (many - few)
        return Measurement(
            round(low.bytes + more * (high.bytes - low.bytes)),
            low.seconds + more * (high.seconds - low.seconds),
        )

    def bytes(
        self,
        kind: str,
        way: Way,
        batch_shape: BatchShape,
        formula: Callable[[Way, BatchShape], float],
    ) -> Estimate:
        """What something needs.

        Args:
            kind: of phase.
            way: in which it is computed.
            batch_shape: the tokens.
            formula: what it needs by way and load where nothing is known.
        """
        if (taken := self.find(kind, way, batch_shape)) is not None:
            return Estimate(taken.bytes, KNOWN)
        expected = formula(way, batch_shape)
        if kind == "tail":
            # As much more as the formula says, than what was measured of as many blocks or so.
            others = {
                w: batch_shapes[batch_shape]
                for w, batch_shapes in self._known.get(kind, {}).items()
                if batch_shape in batch_shapes
            }
            if others:
                nearest = min(others, key=lambda other: abs(other[0] - way[0]))
                more = expected - formula(nearest, batch_shape)
                return Estimate(max(0.0, others[nearest].bytes + more), LIKELY)
        ratios = self._ratios(kind, way, lambda w, n, t: t.bytes / max(1.0, formula(w, n)))
        if not ratios:
            return Estimate(expected, UNKNOWN)
        return Estimate(max(ratios) * expected, LIKELY)

    def seconds(
        self,
        kind: str,
        way: Way,
        batch_shape: BatchShape,
        formula: Callable[[Way, BatchShape], float],
    ) -> float:
        """What something takes, likewise."""
        if (taken := self.find(kind, way, batch_shape)) is not None:
            return taken.seconds
        ratios = self._ratios(kind, way, lambda w, n, t: t.seconds / max(1e-9, formula(w, n)))
        # The least: what seems better than what is known will be measured in its turn.
        return formula(way, batch_shape) * min(ratios, default=self._pace)

    def set_pace(self, formula: Callable[[str, Way, BatchShape], float]) -> None:
        """Take the time of kinds of which nothing is known from how far off a formula is of others.

        Args:
            formula: seconds by kind, way and load.
        """
        if self._paced != self._count:
            pairs = [(t.seconds, formula(k, w, n)) for k, w, n, t in self.rows()]
            self._pace = min(
                (spent / predicted for spent, predicted in pairs if spent and predicted),
                default=1.0,
            )
            self._paced = self._count

    def _ratios(
        self, kind: str, way: Way, ratio: Callable[[Way, BatchShape, Measurement], float]
    ) -> list[float]:
        """Of what was measured in the same way, or else in any way, to what a formula says."""
        ways = self._known.get(kind, {})
        chosen = {way: ways[way]} if way in ways else ways
        return [
            ratio(w, n, t) for w, batch_shapes in chosen.items() for n, t in batch_shapes.items()
        ]

    def rows(self) -> Iterator[tuple[str, Way, BatchShape, Measurement]]:
        """All of it."""
        for kind, ways in self._known.items():
            for way, batch_shapes in ways.items():
                for batch_shape, taken in batch_shapes.items():
                    yield kind, way, batch_shape, taken

    def read(self) -> None:
        """Take what the file has; nothing where it is none."""
        for kind, way, batch_shape, taken in _entries(self.file).get(self.key, []):
            self.add(kind, tuple(way), BatchShape(*batch_shape), Measurement(*taken))

    def write(self) -> None:
        """Keep it; whatever cannot be kept is measured again next time."""
        if self.file is None:
            return
        entries = _entries(self.file)
        entries.pop(self.key, None)
        own = [
            [kind, list(way), list(astuple(n)), [taken.bytes, taken.seconds]]
            for kind, way, n, taken in self.rows()
        ]
        kept = dict([*entries.items(), (self.key, own)][-MODELS:])
        text = json.dumps({"version": VERSION, "models": kept})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({self.file: lambda target: target.write(text.encode())})
        except (OSError, EdgeLoraError):
            return


def _entries(file: Path | None) -> dict[str, list]:
    """The rows of each model; none at all where something in the file is not as it was written."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
        if found["version"] != VERSION:
            return {}
        rows = [row for rows in found["models"].values() for row in rows]
        return found["models"] if all(map(_is_row, rows)) else {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def _is_row(row: list) -> bool:
    kind, way, batch_shape, (size, spent) = row
    numbers = [*batch_shape, size, spent]
    return (
        len(way) == LENGTHS.get(kind, len(way))
        and not any(isinstance(part, list | dict) for part in [kind, *way])
        and len(batch_shape) == 4
        and all(type(number) is int and number > 0 for number in batch_shape[:3])
        and type(batch_shape[3]) is int
        and batch_shape[3] >= 0
        and all(type(number) in (int, float) and 0 <= number < 2**60 for number in numbers)
    )
