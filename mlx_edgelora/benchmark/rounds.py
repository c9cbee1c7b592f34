"""Contenders in turn: A B C A B C, each in a process of its own, every time beside mlx-lm's.

One process computes at a time; the others wait at the end of a step, with what they hold between
steps. As many are started as the machine's memory has room for; mlx-lm's own process stays
throughout and makes a step in every round, so that each ratio is of two steps that followed
one another.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_edgelora.benchmark.contenders import Contender
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.machine import free_memory
from mlx_edgelora.benchmark.results import Result, Step, Tolerance, adapter_gap, find_faults
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.units import size

# Of the budget a process may need besides: what is not MLX's, or was not foreseen.
BESIDES = 1.1
SIGKILL = 9
Log = Callable[[str], None]


class ContenderExited(Exception):
    """A contender's process ended before its run did; the text says why."""


class ContenderProcess:
    """The process of a contender, which waits at the end of each step.

    Args:
        contender: who.
        job: what; its runner and folder are filled in here.
        folder: for what it writes.
    """

    def __init__(self, contender: Contender, job: TrainingJob, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._name = contender.name
        self.job = job.with_(
            runner=contender.runner,
            output=str(folder),
            checkpointing=contender.checkpointing,
        )
        self.result = Result(contender.name, job.options.get("memory_budget"))
        self.waiting = 0  # what it held at the end of the last step
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlx_edgelora.benchmark.worker"],
            env=os.environ | dict(contender.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._write(self.job.json())

    def start(self) -> None:
        """Load, and make the step that warms up.

        Raises:
            ContenderExited: also from the following.
        """
        event = self._read("start")
        self.result.bare, self.result.held = event["footprint"], tuple(event["held"])
        self._take(self._read("step"))

    def step(self) -> float:
        """Make one more step; its seconds."""
        self._write("go")
        self._take(self._read("step"))
        return self.result.steps[-1].seconds

    def finish(self) -> None:
        """Let the run end in its own way, its adapters saved."""
        self._write("go")
        self._used(self._read("done"))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    @property
    def peak_bytes(self) -> int:
        """What it held at most; a GPU's own memory is in no footprint."""
        return max(self.result.footprint, self.result.peak)

    def _take(self, event: dict[str, Any]) -> None:
        read, written = event["moved"] or (None, None)
        step = Step(event["seconds"], event["loss"], read, written, event["unfinished"])
        self.result.steps.append(step)
        self._used(event)

    def _used(self, event: dict[str, Any]) -> None:
        self.result.peak, self.result.footprint = event["peak"], event["peak_footprint"]
        self.waiting = event["waiting"]

    def _write(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # reading tells what happened
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _read(self, expected: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise ContenderExited(self._exit_reason())
        event = json.loads(line)
        if event["event"] == expected:
            return event
        raise ContenderExited(
            event.get("reason", f"it said {event['event']} where {expected} was due")
        )

    def _exit_reason(self) -> str:
        code = self._process.wait()
        if code == -SIGKILL:
            return "it was killed, most likely for want of memory"
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"it ended with status {code}: {lines[-1] if lines else 'without a word'}"


class Comparison:
    """All contenders at one context.

    Args:
        job: the run, without runner and budget.
        folder: for what they write.
        tolerance: how far they may be from mlx-lm.
        log: gets a line for each thing that happens.
    """

    def __init__(self, job: TrainingJob, folder: Path, tolerance: Tolerance, log: Log) -> None:
        self._job, self._folder, self._tolerance, self._log_line = job, folder, tolerance, log
        self._free = free_memory()
        self._reference: ContenderProcess | None = None
        self._count = 0

    def run(self, rivals: Sequence[Contender]) -> list[Result]:
        """Measure all; `rivals[0]` is the reference, `rivals[1]` gives budgets.

        Raises:
            EdgeLoraError: the reference itself cannot run.
        """
        last = self._job.steps * (len(rivals) + 1)  # at most a group for each, and its own end
        self._reference = self._running(rivals[0], self._job.with_(last=last))
        try:
            self._reference.start()
            others = [rival for rival in rivals[1:] if not rival.is_ours]
            own = self._reference.result
            found = {own.name: own}
            for result in self._groups([(rival, self._job) for rival in others]):
                found[result.name] = result
            peak = found[rivals[1].name].peak or own.peak
            ours = [(rival, self._ours(rival, peak)) for rival in rivals if rival.is_ours]
            for result in self._groups(ours):
                found[result.name] = result
            find_faults(own, own, self._tolerance)
            own.steps = own.steps[: self._job.steps]
        except ContenderExited as exited:
            raise EdgeLoraError(
                f"{rivals[0].name} cannot be measured at {self._job.context} tokens: {exited}; "
                "choose fewer --blocks or a shorter context"
            ) from exited
        finally:
            self._reference.close()
        return [found[rival.name] for rival in rivals]

    def _ours(self, rival: Contender, peak: int) -> TrainingJob:
        budget = rival.budget_for(peak)
        return self._job.with_(options=self._job.options | {"memory_budget": budget})

    def _groups(self, waiting: list[tuple[Contender, TrainingJob]]) -> Iterator[Result]:
        """Start as many as there is room for, measure them, and go on with the rest."""
        while waiting:
            group: list[ContenderProcess] = []
            try:
                while waiting and self._has_room(*waiting[0], group):
                    started = self._started(*waiting.pop(0))
                    if isinstance(started, Result):
                        yield started
                    else:
                        group.append(started)
                if waiting and not group and not self._has_room(*waiting[0], group):
                    rival, job = waiting.pop(0)
                    need, room = self._need(rival, job), self._room(group)
                    yield Result(
                        rival.name,
                        absent=f"needs about {size(need)} beside mlx-lm's process, and "
                        f"{size(room)} are free",
                    )
                yield from self._measured(group)
            finally:
                for running in group:
                    running.close()

    def _started(self, rival: Contender, job: TrainingJob) -> "ContenderProcess | Result":
        """A contender after its first step, or why there is none."""
        running = self._running(rival, job)
        try:
            running.start()
        except ContenderExited as exited:
            running.close()
            self._log_line(f"  {rival.name}: {exited}")
            return Result(rival.name, running.result.budget, absent=str(exited))
        except BaseException:
            running.close()
            raise
        self._log_line(f"  {rival.name} warmed up in {running.result.steps[0].seconds:.2f} s")
        return running

    def _measured(self, group: list[ContenderProcess]) -> Iterator[Result]:
        """The rounds of a group, and what came out."""
        alive = list(group)
        for number in range(1, self._job.steps):
            if not alive:
                break
            base = self._reference.step()
            for running in list(alive):
                try:
                    running.result.ratios.append(running.step() / base)
                except ContenderExited as exited:
                    running.result.absent = str(exited)
                    alive.remove(running)
            self._log_line(
                f"  round {number} of {self._job.steps - 1}: {1 + len(alive)} contenders"
            )
        for running in group:
            if running in alive:
                self._judge(running)
            yield running.result

    def _judge(self, running: ContenderProcess) -> None:
        result = running.result
        try:
            running.finish()
        except ContenderExited as exited:
            result.absent = str(exited)
            return
        theirs, start = self._reference.job.adapters, Path(self._job.start)
        result.adapter_gap = adapter_gap(running.job.adapters, theirs, start)
        find_faults(result, self._reference.result, self._tolerance)
        if running.job.plan_file.exists():
            result.plan = json.loads(running.job.plan_file.read_text())

    def _running(self, rival: Contender, job: TrainingJob) -> ContenderProcess:
        self._count += 1
        return ContenderProcess(rival, job, self._folder / f"{self._job.context}-{self._count}")

    def _has_room(self, rival: Contender, job: TrainingJob, group: list[ContenderProcess]) -> bool:
        return self._need(rival, job) <= self._room(group)

    def _need(self, rival: Contender, job: TrainingJob) -> int:
        """Most memory that a contender's process is expected to take."""
        peak_bytes, bare = self._reference.peak_bytes, self._reference.result.bare
        budget = job.options.get("memory_budget")
        if budget == "min":  # far below the smallest of the shares
            return bare + peak_bytes // 4
        if not rival.is_ours:
            return peak_bytes
        return min(peak_bytes, round(BESIDES * budget) + bare)

    def _room(self, group: list[ContenderProcess]) -> int:
        """Free memory beside those that wait, one of whom may be at its peak."""
        alive = [self._reference, *group]
        above = max(running.peak_bytes - running.waiting for running in alive)
        return self._free - sum(running.waiting for running in alive) - above
