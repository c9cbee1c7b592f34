"""Kill a process with SIGKILL while it saves, over and over.

`python dev/reliability/kill_saves.py [kills] [seed]`; 1,000 kills take about three minutes.

The process saves adapters of two ranks in turn, each with a numbered copy. After each kill every
file of weights must be whole, `adapters.safetensors` must fit `adapter_config.json`, and the next
start of a run must leave no temporary file.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

from runs import fork, left_overs, wait, workplace

from mlx_edgelora import EdgeLoraError, TrainConfig
from mlx_edgelora.storage.safetensors import read_header
from mlx_edgelora.training.adapters import check_adapter, save_adapters
from mlx_edgelora.training.resuming import run_folder

RANKS = 4, 8


def save_forever(folder: Path, ready: int) -> None:
    """Save adapters of two ranks in turn; writes a byte to `ready` after the first one."""
    import mlx.core as mx  # noqa: PLC0415 - computes only in the child

    sets = {r: {f"l.{i}.lora_a": mx.ones((64, r)) * r for i in range(20)} for r in RANKS}
    for number in count(1):
        rank = RANKS[number % 2]
        save_adapters(folder, sets[rank], {"lora_parameters": {"rank": rank}}, number % 50 + 1)
        if number == 1:
            os.write(ready, b"x")


def problems(folder: Path) -> list[str]:
    """What is wrong with the files in a folder of adapters."""
    found = []
    for file in folder.glob("*.safetensors"):
        try:
            if not file.name.startswith("0"):
                check_adapter(file)
            ranks = {info.shape[-1] for info in read_header(file).values()}
        except EdgeLoraError as error:
            found.append(f"torn: {error}")
            continue
        config = json.loads((folder / "adapter_config.json").read_bytes())
        if file.name == "adapters.safetensors" and ranks != {config["lora_parameters"]["rank"]}:
            found.append(f"mixed: {file.name} has rank {ranks}")
    return found


def main(kills: int, seed: int) -> int:
    """Returns 1 if a kill left anything that is wrong."""
    rng, counts = random.Random(seed), Counter()
    with workplace() as place:
        folder = place / "adapters"
        for _ in range(kills):
            reader, ready = os.pipe()
            child = fork(lambda ready=ready: save_forever(folder, ready))
            os.read(reader, 1)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            wait(child)
            os.close(reader)
            os.close(ready)
            counts["kills"] += 1
            counts["kills that left temporary files"] += bool(list(folder.glob("*.tmp")))
            counts["without weights"] += not (folder / "adapters.safetensors").exists()
            for problem in problems(folder):
                counts[problem.split(":")[0]] += 1
                print(problem, flush=True)
            with run_folder(TrainConfig(adapter_path=str(folder), overwrite=True)):
                pass
            counts["left-overs after the next start"] += bool(left_overs(folder))
    print(dict(counts))
    wrong = "torn", "mixed", "left-overs after the next start"
    return int(any(counts[name] for name in wrong))


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    sys.exit(main(*numbers, *(1000, 0)[len(numbers) :]))
