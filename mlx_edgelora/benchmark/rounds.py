"""Run contenders in rounds (A B C A B C), each in its own process, with mlx-lm in every round.

One process computes at a time. The others wait at the end of a step and keep their memory. As many
processes run as fit in the memory of the machine. The process of mlx-lm runs throughout and makes a
step in every round, so each ratio compares two steps of the same round.
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
from mlx_edgelora.mlx_settings import PLAIN

# Factor on a budget for memory of the process outside MLX or beyond the estimate.
BESIDES = 1.1
SIGKILL = 9
Log = Callable[[str], None]


class ContenderExited(Exception):
    """A contender's process ended before its run was done; the message is the reason."""


class ContenderProcess:
    """The process of a contender, which waits at the end of each step.

    Args:
        contender: the contender.
        job: the job; its runner, folder and checkpointing are set here.
        folder: folder for its output.
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
        self.waiting = 0  # bytes held at the end of the last step
        plain = [] if contender.is_ours else [PLAIN]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlx_edgelora.benchmark.worker", *plain],
            env=os.environ | dict(contender.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._write(self.job.json())

    def start(self) -> None:
        """Wait until the model is loaded and the warm-up step is done.

        Raises:
            ContenderExited: the process has ended, as in `step` and `finish`.
        """
        event = self._read("start")
        self.result.bare, self.result.held = event["footprint"], tuple(event["held"])
        self._take(self._read("step"))

    def step(self) -> float:
        """Run one more step and return its seconds."""
        self._write("go")
        self._take(self._read("step"))
        return self.result.steps[-1].seconds

    def finish(self) -> None:
        """Let the run end normally and save its adapters."""
        self._write("go")
        self._used(self._read("done"))

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    @property
    def peak_bytes(self) -> int:
        """Largest memory in bytes; the footprint does not include the memory of a discrete GPU."""
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
        with contextlib.suppress(BrokenPipeError):  # `_read` raises the error
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
    """The comparison of all contenders at one context.

    Args:
        job: the run, without runner and budget.
        folder: folder for the output of the contenders.
        tolerance: accepted differences from mlx-lm.
        log: called with progress messages.
    """

    def __init__(self, job: TrainingJob, folder: Path, tolerance: Tolerance, log: Log) -> None:
        self._job, self._folder, self._tolerance, self._log_line = job, folder, tolerance, log
        self._free = free_memory()
        self._reference: ContenderProcess | None = None
        self._count = 0

    def run(self, rivals: Sequence[Contender]) -> list[Result]:
        """Measure all contenders.

        Args:
            rivals: the contenders. The first is the reference; budgets are shares of the second
                one's peak.

        Raises:
            EdgeLoraError: the reference cannot be measured.
        """
        last = self._job.steps * (len(rivals) + 1)  # enough if each contender is its own group
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
        """Measure contenders in groups, each as large as memory allows."""
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
        """A contender after its first step, or a result with the reason for its failure."""
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
        """Run the rounds of a group and yield its results."""
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
        """Upper estimate of the memory of a contender's process in bytes."""
        peak_bytes, bare = self._reference.peak_bytes, self._reference.result.bare
        budget = job.options.get("memory_budget")
        if budget == "min":  # takes far less than the smallest share, 25 %
            return bare + peak_bytes // 4
        if not rival.is_ours:
            return peak_bytes
        return min(peak_bytes, round(BESIDES * budget) + bare)

    def _room(self, group: list[ContenderProcess]) -> int:
        """Free bytes, given that all running processes wait except one, which is at its peak."""
        alive = [self._reference, *group]
        above = max(running.peak_bytes - running.waiting for running in alive)
        return self._free - sum(running.waiting for running in alive) - above
