"""Disturb runs from outside: other runs, equal process ids, links, removed folders, clock, locale.

`python dev/reliability/surroundings.py [rounds] [seed]`; 10 rounds take about two minutes.

Every run must end with the bytes of an undisturbed one, or with one sentence and a status that is
not zero; no file outside its folders may change, and after the next start no temporary file may be
left. Namespaces need Linux and the right to make them.
"""

import ctypes
import locale
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from runs import fork, left_overs, remove, train, wait, weights, workplace

# Flags of unshare(2) for a new namespace of users and one of process ids.
NAMESPACES = 0x10000000 | 0x20000000
UNREADABLE = b"a file of somebody else"


class Place:
    """A workplace, the bytes an undisturbed run ends with, and what was counted."""

    def __init__(self, place: Path, rng: random.Random) -> None:
        self.path, self.rng, self.counts = place, rng, Counter()
        begin = time.perf_counter()
        for name in ("whole", "again"):
            begin = time.perf_counter()
            wait(self.start(name))
        self.seconds = time.perf_counter() - begin
        self.expected = weights(place / "whole")

    def start(self, name: str, before: Callable[[], object] = lambda: None, **changes) -> int:
        """Begin a run in a child process; returns its id."""

        def run() -> None:
            before()
            train(self.path, name, **changes)

        return fork(run, self.path / f"{name}.errors")

    def ended(self, what: str, name: str, status: int, may_fail: bool = True) -> None:
        """Look at what a run has left."""
        errors = (self.path / f"{name}.errors").read_text("utf-8", "backslashreplace")
        self.counts[f"{what}: ended {'well' if status == 0 else 'with a sentence'}"] += 1
        if "Traceback" in errors or (status and not errors.startswith("error: ")):
            self.wrong(what, f"no sentence: {errors[-300:]}")
        if status < 0 or (status and not may_fail):
            self.wrong(what, f"status {status}: {errors[-300:]}")
        if status == 0 and weights(self.path / name) != self.expected:
            self.wrong(what, "other bytes")

    def clean(self, what: str, name: str) -> None:
        """After the next start nothing temporary may be left."""
        if status := wait(self.start(name, overwrite=True)):
            self.wrong(what, f"the next run failed with {status}")
        if left := left_overs(self.path / name, self.path / "spill", self.path / "cache"):
            self.wrong(what, f"left over: {left}")
        remove(self.path / name)

    def wrong(self, what: str, why: str) -> None:
        """Count and print a failure."""
        self.counts[f"{what}: WRONG"] += 1
        print(f"{what}: {why}", flush=True)

    def pause(self) -> None:
        """Wait for a random time within a run."""
        time.sleep(self.rng.uniform(0.05, 1) * self.seconds)


def two_runs(place: Place, what: str, before: Callable[[], object] = lambda: None) -> None:
    """Two runs write to one folder: one of them is refused."""
    children = [place.start(name, before) for name in ("one", "other")]
    for name, child in zip(("one", "other"), children, strict=True):
        place.ended(what, name, wait(child), may_fail=False)
    names = ["shared", "shared"]
    children = [
        fork(lambda: (before(), train(place.path, "shared")), place.path / f"{number}.errors")
        for number in range(2)
    ]
    statuses = [wait(child) for child in children]
    if sorted(statuses) not in ([0, 2], [0, 0]):
        place.wrong(what, f"statuses {statuses} in one folder")
    if weights(place.path / names[0]) != place.expected:
        place.wrong(what, "other bytes in a folder of two")
    for name in ("one", "other", "shared"):
        place.clean(what, name)


def own_namespace() -> None:
    """Go on as process 1 of a new namespace; the parent ends as the child does."""
    if ctypes.CDLL(None, use_errno=True).unshare(NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    if os.getpid() != 1:
        raise RuntimeError("not the first process of its namespace")


def links(place: Place, what: str) -> None:
    """Names of the run are links to a file and a folder of somebody else."""
    folder, theirs = place.path / "linked", place.path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_bytes(UNREADABLE)
    folder.mkdir()
    for name in (
        "adapters.safetensors",
        "adapter_config.json",
        ".lock",
        "0000002_adapters.safetensors",
    ):
        (folder / name).symlink_to(theirs / "file")
    (folder / "checkpoints").symlink_to(theirs)
    place.ended(what, "linked", wait(place.start("linked", overwrite=True)))
    if (theirs / "file").read_bytes() != UNREADABLE:
        place.wrong(what, "a linked file was changed")
    for path in (folder, theirs):
        shutil.rmtree(path)


def removed(place: Place, what: str) -> None:
    """A folder disappears in the middle of a run."""
    for name in ("gone", "spill"):
        child = place.start("gone")
        place.pause()
        shutil.rmtree(place.path / name, ignore_errors=True)
        status = wait(child)
        (place.path / "spill").mkdir(exist_ok=True)
        if status or (place.path / "gone" / "adapters.safetensors").exists():
            place.ended(what, "gone", status)
        place.clean(what, "gone")


def clock(place: Place, what: str) -> None:
    """The clock is set years forward and back while runs are killed and resumed."""
    years = 10 * 365 * 86400.0
    for shift in (years, -years):

        def change(shift: float = shift) -> None:
            own, begin = time.time, time.monotonic()
            time.time = lambda: own() + shift * (time.monotonic() - begin > place.seconds / 4)

        child = place.start("clocked", change)
        place.pause()
        os.kill(child, signal.SIGKILL)
        wait(child)
        resumes = {"resume": str(place.path / "clocked")}
        if not list(place.path.glob("clocked/checkpoints/0*")):
            resumes = {"overwrite": True}
        status = wait(place.start("clocked", change, **resumes))
        if status != 2 or "raise it to go on" not in (place.path / "clocked.errors").read_text():
            place.ended(what, "clocked", status, may_fail=False)
        place.clean(what, "clocked")


def locales(place: Place, what: str) -> None:
    """Those of some locales that the system has."""
    for name in ("C", "POSIX", "C.UTF-8", "en_US.ISO-8859-1", "tr_TR.UTF-8", "ja_JP.eucJP"):
        before = locale.setlocale(locale.LC_ALL)
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            place.counts[f"{what}: {name} is not installed"] += 1
            continue
        place.ended(what, "spoken", wait(place.start("spoken")), may_fail=False)
        locale.setlocale(locale.LC_ALL, before)
        place.clean(what, "spoken")


def main(rounds: int, seed: int) -> int:
    """Returns 1 if anything was wrong."""
    with workplace() as path:
        place = Place(path, random.Random(seed))
        for _ in range(rounds):
            two_runs(place, "two runs")
            two_runs(place, "equal process ids", own_namespace)
            links(place, "planted links")
            removed(place, "removed folders")
            clock(place, "clock")
        locales(place, "locales")
        for what, count in sorted(place.counts.items()):
            print(f"{count:5} {what}")
        return int(any("WRONG" in what for what in place.counts))


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    sys.exit(main(*numbers, *(10, 0)[len(numbers) :]))
