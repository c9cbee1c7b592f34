"""Let every single operation on files fail in a run, or kill the run there.

`python dev/reliability/faulty_disk.py [scenario ...] [failure ...] [N]`, by default all of both and
every operation instead of every N-th; each takes some three to six minutes.

Scenarios: `resume` goes on with a run that was stopped after 4 of 8 steps; `overwrite` replaces
another run and quantizes its model first. Both accumulate gradients, page the optimizer's state,
validate, keep the best adapter, and write checkpoints, a log, a report, a plan and caches.
Failures: `ENOSPC`, `EDQUOT` and `EIO` fail one write, sync, rename or creation; `full` is ENOSPC
from there on; `kill` is SIGKILL instead of that operation.

After each failure the run has ended well, or with one sentence and a status that is not zero. Its
newest checkpoint is whole, and its adapter is that of a save of this run or of the run before. The
next start ends with the bytes of an undisturbed run and leaves no temporary file anywhere.
"""

import errno
import os
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from runs import (
    Faults,
    faulty,
    find_checkpoint,
    fork,
    has_checkpoint,
    left_overs,
    remove,
    train,
    wait,
    weights,
    workplace,
)

from mlx_edgelora.training.adapters import check_adapter

FAILURES = {
    "ENOSPC": {"error": errno.ENOSPC},
    "EDQUOT": {"error": errno.EDQUOT},
    "EIO": {"error": errno.EIO},
    "full": {"error": errno.ENOSPC, "lasting": True},
    "kill": {"error": None},
}
SHORT = {"iters": 8, "save_every": 2, "val_batches": 1, "steps_per_eval": 4, "save_best": True}


class Scenario:
    """A run that is disturbed, and what it may leave.

    Args:
        place: folder of everything.
        name: "resume" or "overwrite".
        failure: the parameters of `Faults` besides the number of the operation.
    """

    def __init__(self, place: Path, name: str, failure: dict) -> None:
        self.place, self.name, self.failure = place, name, failure
        self.folder, self.before = place / "run", place / "before"
        remove(self.before)
        changes = {} if name == "resume" else {"learning_rate": 1e-4, "lr_schedule": None}
        wait(fork(partial(train, place, "before", **SHORT | {"iters": 4, "log": None} | changes)))
        self.allowed = {weights(self.before)}
        self.start()
        self.operations = self.count()
        self.expected = weights(self.folder)
        names = self.folder.glob("*_adapters.safetensors")
        self.allowed |= {path.read_bytes() for path in names} | {self.expected}

    def start(self) -> None:
        """Put everything back to what it was before the run."""
        for name in ("run", "cache", "written", "temporary", "spill"):
            remove(self.place / name)
            if name != "run":
                (self.place / name).mkdir()
        shutil.copytree(self.before, self.folder)

    def options(self) -> dict:
        """Options of the run."""
        written = self.place / "written"
        own = {name: str(written / name) for name in ("log", "report", "plan_out")}
        if self.name == "resume":
            return SHORT | own | {"resume": True}
        model = str(self.place / "unquantized")
        return SHORT | own | {"overwrite": True, "model": model, "quantize": 4}

    def count(self) -> list[str]:
        """The operations of an undisturbed run."""
        file = self.place / "operations"

        def run() -> None:
            with faulty(Faults(error=self.failure["error"])) as faults:
                train(self.place, "run", **self.options())
            file.write_text("\n".join(faults.calls))

        assert wait(fork(run)) == 0
        return file.read_text().split()

    def disturb(self, at: int) -> list[str]:
        """What is wrong after the operation `at` has failed, and after the next start."""
        self.start()
        errors = self.place / "errors"

        def run() -> None:
            with faulty(Faults(at, **self.failure)):
                train(self.place, "run", **self.options())

        status = wait(fork(run, errors))
        wrong = self.ended(status, errors.read_text().splitlines())
        wrong += self.state()
        return wrong + self.next_start()

    def ended(self, status: int, lines: list[str]) -> list[str]:
        """Problems of how the run ended."""
        if self.failure["error"] is None:
            return [] if status in (0, -signal.SIGKILL) else [f"status {status}", *lines]
        if status == 0 and not lines:
            return []
        good = status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        return [] if good else [f"status {status}", *lines]

    def state(self) -> list[str]:
        """Problems of what the run left."""
        wrong = []
        try:
            if has_checkpoint(self.folder):
                find_checkpoint(self.folder)
            elif self.name == "resume":
                wrong.append("no checkpoint")
            if (self.folder / "adapters.safetensors").exists():
                check_adapter(self.folder / "adapters.safetensors")
                if weights(self.folder) not in self.allowed:
                    wrong.append("an adapter of no save")
            elif self.failure["error"] is not None:
                wrong.append("no adapter")
        except Exception as error:  # noqa: BLE001 - any is a finding
            wrong.append(f"{type(error).__name__}: {error}")
        return wrong

    def next_start(self) -> list[str]:
        """Problems of a run that follows undisturbed."""
        options = self.options()
        if self.name == "overwrite" and self.is_new():
            options = options | {"overwrite": False, "resume": True}
        ended = has_checkpoint(self.folder) and find_checkpoint(self.folder).state.step == 8
        errors = self.place / "errors"
        status = wait(fork(partial(train, self.place, "run", **options), errors))
        wrong = []
        if status and not (ended and "of step 8 already" in errors.read_text()):
            wrong.append(f"next start: status {status}, {errors.read_text().strip()}")
        if status == 0 and weights(self.folder) != self.expected:
            wrong.append("next start: other bytes")
        left = left_overs(*(self.place / n for n in ("run", "cache", "written", "temporary")))
        return wrong + [f"left over: {name}" for name in left]

    def is_new(self) -> bool:
        """Whether the newest checkpoint is one of the disturbed run."""
        if not has_checkpoint(self.folder):
            return False
        return find_checkpoint(self.folder).config.get("quantize") == 4


def main(names: list[str]) -> int:
    """Returns 1 if anything was wrong."""
    scenarios = [name for name in names if name in ("resume", "overwrite")]
    failures = [name for name in names if name in FAILURES]
    every = next((int(name) for name in names if name.isdecimal()), 1)
    bad = 0
    with workplace() as place:
        for name in scenarios or ["resume", "overwrite"]:
            for failure in failures or FAILURES:
                scenario = Scenario(place, name, FAILURES[failure])
                kinds, found = Counter(scenario.operations), 0
                total = len(scenario.operations)
                print(name, failure, f"{total} operations:", dict(kinds), flush=True)
                for at in range(1, total + 1, every):
                    if wrong := scenario.disturb(at):
                        found += 1
                        print(name, failure, at, scenario.operations[at - 1], wrong, flush=True)
                print(name, failure, f"{found} with problems", flush=True)
                bad += found
    return int(bad > 0)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(sys.argv[1:]))
