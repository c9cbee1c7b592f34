"""Measurements of the phases of a step on this machine: bytes and seconds.

Phases are measured with a few blocks before the first step of a run (`training/sampling.py`), at
the shapes of the run. Measurements are kept in a file per machine, versions and model. A phase that
was not measured is estimated by a formula (`planner/needs.py`), scaled by the ratio of measurement
to formula in similar phases.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.text import say
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.storage.files import CACHE_ERRORS, error_line, updating, write_atomically

# Version of the file. Raise it when the meaning of its numbers or the engine's memory use changes.
VERSION = 7
# Number of settings that each kind of phase has in `cost.ways_of`.
BLOCK = ("forward", "backward", "tiles forward", "tiles backward")
LENGTHS = dict.fromkeys(BLOCK, 7) | {"load": 0, "head": 2, "tail": 5, "update": 1}
# Number of models that the file keeps.
MODELS = 64
# Factors from an estimate to its upper bound: for an exact measurement, for a measurement with
# another batch or other settings, and for a formula alone. See docs/planner.md.
KNOWN, LIKELY, UNKNOWN = 1.08, 1.2, 1.35

Way = tuple[object, ...]


@dataclass(frozen=True)
class Measurement:
    """A measured phase.

    Attributes:
        bytes: memory in addition to what the planner accounts for exactly.
        seconds: time.
    """

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """An expected number and the factor to its upper bound."""

    value: float
    spread: float


@dataclass
class Measurements:
    """The measurements of one model on one machine.

    Attributes:
        file: file that keeps them; None keeps them in memory only.
        key: key of the machine, versions and model in this file.
        overlaps: whether the next segment is built while one is computed, as on a GPU.
        correction: factor on expected peaks, found by measuring whole steps.
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
        """Whether there are no measurements."""
        return not self._known

    def add(self, kind: str, way: Way, batch_shape: BatchShape, taken: Measurement) -> None:
        """Add a measurement."""
        self._known.setdefault(kind, {}).setdefault(way, {})[batch_shape] = taken
        self._count += 1

    def find(self, kind: str, way: Way, batch_shape: BatchShape) -> Measurement | None:
        """Look up a measurement; None if there is none.

        A tail of kept blocks is extrapolated from tails with other numbers of blocks.
        """
        ways = self._known.get(kind, {})
        found = ways.get(way, {}).get(batch_shape)
        if found is not None or kind != "tail":
            return found
        known = sorted(
            w[0]
            for w, batch_shapes in ways.items()
            if w[1:] == way[1:] and batch_shape in batch_shapes
        )
        # The peak of fewer blocks may be another phase's, which does not grow with their number.
        if len(known) < 2 or way[0] < known[0]:
            return None
        few, many = known[-2:]
        low, high = (ways[(count, *way[1:])][batch_shape] for count in (few, many))
        more = (way[0] - few) / (many - few)
        return Measurement(
            round(low.bytes + more * (high.bytes - low.bytes)),
            low.seconds + more * max(0.0, high.seconds - low.seconds),  # more work is not less time
        )

    def bytes(
        self,
        kind: str,
        way: Way,
        batch_shape: BatchShape,
        formula: Callable[[Way, BatchShape], float],
    ) -> Estimate:
        """Estimate the bytes of a phase.

        Args:
            kind: kind of phase.
            way: settings by which it is computed.
            batch_shape: sizes of the batch.
            formula: bytes by settings and batch, used if there is no measurement.
        """
        if (taken := self.find(kind, way, batch_shape)) is not None:
            exact = batch_shape in self._known[kind].get(way, {})
            return Estimate(taken.bytes, KNOWN if exact else LIKELY)
        expected = formula(way, batch_shape)
        if kind == "tail":
            # The measured tail nearest in its number of blocks, plus the formula's difference.
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
        """Estimate the seconds of a phase; arguments as in `bytes`.

        A tail that was not measured itself takes the least that others suggest: the difference of
        two short tails is mostly noise.
        """
        known = self._known.get(kind, {}).get(way, {}).get(batch_shape)
        if known is not None:
            return known.seconds
        taken = self.find(kind, way, batch_shape)
        ratios = self._ratios(kind, way, lambda w, n, t: t.seconds / max(1e-9, formula(w, n)))
        # The lowest ratio is taken: a plan that seems faster than the measured ones will be
        # measured next.
        expected = formula(way, batch_shape) * min(ratios, default=self._pace)
        return expected if taken is None else min(expected, taken.seconds)

    def set_pace(self, formula: Callable[[str, Way, BatchShape], float]) -> None:
        """Set the factor on the formula's seconds for kinds of phases without measurements.

        Args:
            formula: seconds by kind, settings and batch.
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
        """Ratios of measurement to formula with the same settings, else with any settings."""
        ways = self._known.get(kind, {})
        chosen = {way: ways[way]} if way in ways else ways
        return [
            ratio(w, n, t) for w, batch_shapes in chosen.items() for n, t in batch_shapes.items()
        ]

    def rows(self) -> Iterator[tuple[str, Way, BatchShape, Measurement]]:
        """All measurements."""
        for kind, ways in self._known.items():
            for way, batch_shapes in ways.items():
                for batch_shape, taken in batch_shapes.items():
                    yield kind, way, batch_shape, taken

    def read(self) -> None:
        """Add the measurements in the file; none if it is missing or invalid."""
        for kind, way, batch_shape, taken in _entries(self.file).get(self.key, []):
            self.add(kind, tuple(way), BatchShape(*batch_shape), Measurement(*taken))

    def write(self) -> None:
        """Write the file; after a failure, the next run measures again."""
        if self.file is None:
            return
        own = [
            [kind, list(way), list(n.sizes().values()), [taken.bytes, taken.seconds]]
            for kind, way, n, taken in self.rows()
        ]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with updating(self.file.parent):  # other processes add their models
                entries = _entries(self.file)
                entries.pop(self.key, None)
                kept = dict([*entries.items(), (self.key, own)][-MODELS:])
                text = json.dumps({"version": VERSION, "models": kept})
                write_atomically({self.file: lambda target: target.write(text.encode())})
        except (OSError, EdgeLoraError):
            return


def _entries(file: Path | None) -> dict[str, list]:
    """The rows of each model; empty if any part of the file is invalid."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_bytes())
        if found["version"] != VERSION:
            say(f"note: {file} is of another version; models are measured again")
            return {}
        if not all(_is_row(row) for rows in found["models"].values() for row in rows):
            raise ValueError("a row is no measurement")
        return found["models"]
    except FileNotFoundError:
        return {}
    except CACHE_ERRORS as error:
        say(f"note: {file}: cannot be used ({error_line(error)}); models are measured again")
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
