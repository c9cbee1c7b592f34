"""Where the memory of a step goes: the allocator's peak of every phase of every block.

Code that does the work names what it does by `phase`; that costs nothing until somebody
records. Recording starts a new peak at each change of phase, and what lies in between belongs
to the innermost phase, or to the one before where there is none around it. The whole peak is
not lost by it (`meter.lap`).
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
    """Some time of a step spent in one phase of one block.

    Attributes:
        phase: what was done.
        block: its index; None outside the blocks.
        start_bytes: what MLX's allocator held when it began.
        peak_bytes: the most it held.
        seconds: how long it took; on a GPU, which works behind, as far as was waited for it.
    """

    phase: str
    block: int | None
    start_bytes: int
    peak_bytes: int
    seconds: float = 0.0


class Profile:
    """The stretches of the last step that was recorded, in order."""

    def __init__(self) -> None:
        self.entries: list[PhasePeak] = []
        self._stack: list[tuple[str, int | None, int]] = []
        self._changed = time.perf_counter()

    def begin_step(self) -> None:
        """Forget the step before."""
        lap()
        self._changed = time.perf_counter()
        self.entries.clear()

    def finish(self) -> None:
        """The step is over: what was done since the last phase belongs to it."""
        self._close()

    def begin(self, phase: str, block: int | None) -> None:
        """Begin a phase; block None is the block of the phase around it."""
        self._close()
        if block is None and self._stack:
            block = self._stack[-1][1]
        self._stack.append((phase, block, mx.get_active_memory()))

    def end(self) -> None:
        """End the innermost phase."""
        self._close()
        self._stack.pop()

    def peak(self) -> PhasePeak:
        """The stretch with the most memory; the first of several."""
        return max(self.entries, key=lambda entry: entry.peak_bytes)

    def by_phase(self) -> dict[str, PhasePeak]:
        """Of each phase the stretch with the most memory."""
        result: dict[str, PhasePeak] = {}
        for entry in self.entries:
            best = result.get(entry.phase)
            if best is None or entry.peak_bytes > best.peak_bytes:
                result[entry.phase] = entry
        return {phase: result[phase] for phase in PHASES if phase in result}

    def table(self) -> str:
        """A few lines: of each phase its peak, and where the peak of the step stands."""
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
        """All entries as text."""
        return json.dumps(self.rows(), indent=1)

    def plot(self, file: BinaryIO) -> None:
        """Draw the peak of each stretch over the step; needs matplotlib (the `plot` extra)."""
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
        """Count what was held since the last change to the innermost phase, or the one before."""
        peak, now = lap(), time.perf_counter()
        spent, self._changed = now - self._changed, now
        last = self.entries[-1] if self.entries else None
        if self._stack:
            phase, block, start = self._stack[-1]
            peak = max(peak, start)  # MLX counts anew from nothing until something is allocated
            if last is None or (last.phase, last.block) != (phase, block):
                last = PhasePeak(phase, block, start, peak)
                self.entries.append(last)
        if last is not None:
            last.peak_bytes = max(last.peak_bytes, peak)
            last.seconds += spent


_recording: list[Profile] = []


@contextmanager
def recording() -> Iterator[Profile]:
    """Record all phases from here on, in this process."""
    profile = Profile()
    _recording.append(profile)
    try:
        yield profile
    finally:
        _recording.remove(profile)


@contextmanager
def phase(name: str, block: int | None = None) -> Iterator[None]:
    """Say that what follows is one of `PHASES`, of a block, or of that of the phase around it."""
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
    """Say that a new step begins."""
    if _recording:
        _recording[-1].begin_step()
