"""Profile the memory of a step: the allocator's peak in every phase of every block.

The code of a step marks its phases with `phase`, which costs nothing unless a profile is recorded.
A recording starts a new peak at each change of phase. Memory between two changes belongs to the
innermost phase or, outside of phases, to the last one. The peak of the whole run is still measured
(`meter.lap`).
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import mlx.core as mx

from mlx_edgelora.measure.meter import lap
from mlx_edgelora.measure.units import size

MB = 10**6
PHASES = (
    "load",
    "forward",
    "spill",
    "head",
    "recompute",
    "backward",
    "update",
)


@dataclass
class PhasePeak:
    """One phase of one block in a step.

    Attributes:
        phase: name of the phase.
        block: index of the block; None outside the blocks.
        start_bytes: bytes that MLX's allocator held at the start.
        peak_bytes: peak of MLX's allocator in bytes.
        seconds: duration. A GPU computes asynchronously, so only time spent waiting for it counts.
    """

    phase: str
    block: int | None
    start_bytes: int
    peak_bytes: int
    seconds: float = 0.0


class Profile:
    """The phases of the last recorded step, in order."""

    def __init__(self) -> None:
        self.entries: list[PhasePeak] = []
        self._stack: list[tuple[str, int | None, int]] = []
        self._changed = time.perf_counter()

    def begin_step(self) -> None:
        """Begin a step: discard the previous one."""
        lap()
        self._changed = time.perf_counter()
        self.entries.clear()

    def finish(self) -> None:
        """End the step; memory since the last change belongs to the last phase."""
        self._close()

    def begin(self, phase: str, block: int | None) -> None:
        """Begin a phase; with block None it belongs to the block of the enclosing phase."""
        self._close()
        if block is None and self._stack:
            block = self._stack[-1][1]
        self._stack.append((phase, block, mx.get_active_memory()))

    def end(self) -> None:
        """End the innermost phase."""
        self._close()
        self._stack.pop()

    def peak(self) -> PhasePeak:
        """The entry with the highest peak; the first of several."""
        return max(self.entries, key=lambda entry: entry.peak_bytes)

    def by_phase(self) -> dict[str, PhasePeak]:
        """The entry with the highest peak for each phase."""
        result: dict[str, PhasePeak] = {}
        for entry in self.entries:
            best = result.get(entry.phase)
            if best is None or entry.peak_bytes > best.peak_bytes:
                result[entry.phase] = entry
        return {phase: result[phase] for phase in PHASES if phase in result}

    def table(self) -> str:
        """A table with the peak of each phase; the peak of the step is marked."""
        top = self.peak()
        lines = [f"{'phase':<12}{'peak':>10}{'began at':>10}  block"]
        for phase, entry in self.by_phase().items():
            mark = "  <- the peak of the step" if entry is top else ""
            where = "-" if entry.block is None else entry.block
            lines.append(
                f"{phase:<12}{size(entry.peak_bytes):>10}{size(entry.start_bytes):>10}"
                f"  {where}{mark}"
            )
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """All entries as JSON values."""
        return [asdict(entry) for entry in self.entries]

    def json(self) -> str:
        """All entries as JSON."""
        return json.dumps(self.rows(), indent=1)

    def plot(self, file: BinaryIO) -> None:
        """Plot the peak of each entry over the step; needs matplotlib (the `plot` extra)."""
        import matplotlib  # noqa: PLC0415 - an optional dependency

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415

        figure, axis = pyplot.subplots(figsize=(10, 4), layout="constrained")
        for number, phase in enumerate(self.by_phase()):
            places = [i for i, s in enumerate(self.entries) if s.phase == phase]
            heights = [self.entries[i].peak_bytes / MB for i in places]
            axis.bar(places, heights, width=1.0, color=f"C{number}", label=phase)
        top = self.peak()
        axis.axhline(top.peak_bytes / MB, color="black", linewidth=0.8, linestyle="--")
        where = "" if top.block is None else f" of block {top.block}"
        axis.set(
            title=f"One step: peak {size(top.peak_bytes)}, in {top.phase}{where}",
            xlabel="phases of blocks, in order",
            ylabel="peak of MLX's allocator, MB",
        )
        axis.legend(fontsize=8, ncols=4, loc="lower center")
        figure.savefig(file, format="png", dpi=110)
        pyplot.close(figure)

    def _close(self) -> None:
        """Add peak and time since the last change to the innermost phase, or else the last one."""
        peak, now = lap(), time.perf_counter()
        spent, self._changed = now - self._changed, now
        last = self.entries[-1] if self.entries else None
        if self._stack:
            phase, block, start = self._stack[-1]
            peak = max(peak, start)  # after a reset, MLX's peak is 0 until the next allocation
            if last is None or (last.phase, last.block) != (phase, block):
                last = PhasePeak(phase, block, start, peak)
                self.entries.append(last)
        if last is not None:
            last.peak_bytes = max(last.peak_bytes, peak)
            last.seconds += spent


_recording: list[Profile] = []


@contextmanager
def recording() -> Iterator[Profile]:
    """Record the phases of steps in this process."""
    profile = Profile()
    _recording.append(profile)
    try:
        yield profile
    finally:
        _recording.remove(profile)


@contextmanager
def phase(name: str, block: int | None = None) -> Iterator[None]:
    """Mark the code in this context as a phase.

    Args:
        name: one of `PHASES`.
        block: index of the block; None for the block of the enclosing phase, if any.
    """
    if not _recording:
        yield
        return
    profile = _recording[-1]
    profile.begin(name, block)
    try:
        yield
    finally:
        profile.end()


def begin_step() -> None:
    """Mark the start of a new step."""
    if _recording:
        _recording[-1].begin_step()
