"""Kill runs at random points with SIGKILL, and resume them.

`python dev/reliability/kill_runs.py [kills] [seed]`; 200 kills take about six minutes.

A run accumulates gradients, has a schedule and dropout, keeps the optimizer's state in a file, and
saves every second step. After each kill the newest checkpoint must be whole, and the resumed run
must end with the bytes of the run that was never stopped and leave no temporary file. Every fifth
resumed run is killed as well and resumed once more.
"""

import os
import random
import signal
import sys
import time
from collections import Counter

from runs import (
    OPTIONS,
    find_checkpoint,
    fork,
    has_checkpoint,
    left_overs,
    remove,
    timed,
    train,
    wait,
    weights,
    workplace,
)


def main(kills: int, seed: int) -> int:
    """Returns 1 if a run was not resumed exactly."""
    rng, counts, steps = random.Random(seed), Counter(), Counter()
    with workplace() as place:
        for name in ("whole", "again"):  # the second one finds caches, as those that follow
            seconds = timed(lambda name=name: wait(fork(lambda: train(place, name))))
        expected = weights(place / "whole")
        counts["two whole runs differ"] += weights(place / "again") != expected
        folder = place / "killed"
        while counts["kills"] < kills:
            remove(folder)
            for more in range(1 + (counts["kills"] % 5 == 0)):
                child = fork(lambda more=more: train(place, "killed", **start(folder, more)))
                time.sleep(rng.uniform(0.3, 1) * seconds)
                os.kill(child, signal.SIGKILL)
                if wait(child) == -signal.SIGKILL:
                    counts["kills"] += 1
                counts["left-overs of a kill"] += bool(list(place.rglob("*.tmp")))
            step = find_checkpoint(folder).state.step if has_checkpoint(folder) else 0
            steps[step] += 1
            status = wait(fork(lambda: train(place, "killed", **start(folder, True))))
            if step == OPTIONS["iters"]:  # killed after its last save: nothing is left to do
                counts["had ended"] += 1
            else:
                counts["resumed"] += 1
                counts["resumed runs that failed"] += status != 0
            counts["other bytes"] += weights(folder) != expected
            left = left_overs(folder, place / "spill", place / "cache")
            counts["left-overs after the next start"] += bool(left)
            if left:
                print(left, flush=True)
    print(f"{seconds:.2f} s a run; steps of the newest checkpoint: {dict(sorted(steps.items()))}")
    print(dict(counts))
    wrong = "other bytes", "resumed runs that failed", "left-overs after the next start"
    return int(any(counts[name] for name in (*wrong, "two whole runs differ")))


def start(folder, more: bool) -> dict:
    """Options of the next run: it resumes if it can, and else begins anew."""
    return {"resume": True} if more and has_checkpoint(folder) else {"overwrite": True}


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    sys.exit(main(*numbers, *(200, 0)[len(numbers) :]))
