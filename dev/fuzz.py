"""Run the fuzzer of the tests over many inputs: `python dev/fuzz.py [inputs] [first]`.

Inputs are run in worker processes, so that one that ends its process is seen and attributed. A
worker that does not answer for `LIMIT` seconds is ended. Prints every finding and a table; exits
with 1 if there is one.
"""

import argparse
import collections
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds that an input may take, and bytes of address space of a worker.
LIMIT, MEMORY = 10, 12 << 30


def work() -> None:
    """Answer numbers of inputs with their outcomes, a line each."""
    import resource  # noqa: PLC0415 - only in workers

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    from fuzzing import Fuzzer  # noqa: PLC0415 - slow to import

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        fuzzer = Fuzzer(Path(folder))
        print("ready", *fuzzer.targets, file=answers, flush=True)
        for line in sys.stdin:
            name, outcome = fuzzer.run(int(line))
            print(name, outcome.encode("ascii", "backslashreplace").decode(), file=answers)
            answers.flush()


class Worker:
    """A process that runs inputs; `number` is the one it runs, None while it starts."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.number: int | None = None
        self.began = time.monotonic() + 110  # it may take two minutes to start

    def give(self, number: int) -> None:
        """Let it run an input."""
        self.number, self.began = number, time.monotonic()
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """End it; returns its exit status."""
        status = self.process.poll()
        self.process.kill()
        self.process.communicate()
        return status if status is not None else self.process.returncode


class Campaign:
    """A run of many inputs.

    Attributes:
        counts: inputs by target and kind of outcome.
        findings: a line for each input that is neither accepted nor refused.
        slowest: longest time of an input, in seconds.
    """

    def __init__(self, count: int, first: int) -> None:
        self.counts: collections.Counter = collections.Counter()
        self.findings: list[str] = []
        self.slowest = 0.0
        self._numbers = iter(range(first, first + count))
        self._targets: list[str] = []
        self._selector = selectors.DefaultSelector()

    def run(self, workers: int) -> None:
        """Run all inputs in so many processes."""
        for _ in range(workers):
            self._start()
        while running := [key.data for key in self._selector.get_map().values()]:
            ready = {key.data for key, _ in self._selector.select(0.5)}
            for worker in running:
                if worker in ready:
                    self._hear(worker)
                elif time.monotonic() - worker.began > LIMIT:
                    self._lose(worker, "OVER TIME")

    def _start(self) -> None:
        worker = Worker()
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _close(self, worker: Worker) -> int:
        self._selector.unregister(worker.process.stdout)
        return worker.end()

    def _lose(self, worker: Worker, what: str) -> None:
        status = self._close(worker)
        if worker.number is None:
            raise RuntimeError(f"a worker does not start (status {status})")
        name = self._targets[worker.number % len(self._targets)]
        self.counts[name, what] += 1
        self._find(f"{worker.number} {name} {what} (status {status})")
        self._start()

    def _find(self, line: str) -> None:
        self.findings.append(line)
        print(line, flush=True)

    def _hear(self, worker: Worker) -> None:
        line = worker.process.stdout.readline()
        if not line:
            self._lose(worker, "DEAD")
            return
        name, outcome = line.rstrip("\n").split(" ", 1)
        if name == "ready":
            self._targets = outcome.split()
        else:
            self.slowest = max(self.slowest, time.monotonic() - worker.began)
            kind = outcome.partition(":")[0]
            self.counts[name, kind] += 1
            if kind not in ("accepted", "refused"):
                self._find(f"{worker.number} {name} {outcome}")
        number = next(self._numbers, None)
        if number is None:
            self._close(worker)
        else:
            worker.give(number)


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=20_000, help="Number of inputs.")
    parser.add_argument("first", type=int, nargs="?", default=0, help="Number of the first input.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    began = time.monotonic()
    campaign = Campaign(options.inputs, options.first)
    try:
        campaign.run(options.workers)
    except KeyboardInterrupt:
        print("interrupted")
    counts, findings = campaign.counts, campaign.findings
    kinds = ["accepted", "refused", "WRONG", "TRACEBACK", "DEAD", "OVER TIME"]
    print(f"{'target':<18}" + "".join(f"{kind:>11}" for kind in kinds))
    for name in sorted({name for name, _ in counts}):
        print(f"{name:<18}" + "".join(f"{counts[name, kind]:>11}" for kind in kinds))
    totals = [sum(n for (_, k), n in counts.items() if k == kind) for kind in kinds]
    print(f"{'all':<18}" + "".join(f"{total:>11}" for total in totals))
    spent = time.monotonic() - began
    print(f"{sum(totals)} inputs in {spent:.0f} s, the slowest {campaign.slowest:.1f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
