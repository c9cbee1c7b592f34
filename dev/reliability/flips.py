"""Change single bits of an adapter and of a checkpoint, and cut them off everywhere.

`python dev/reliability/flips.py [flips of data] [seed]`; by default 4,000 flips in the data of each
file of weights, all flips in their headers and in all other files, and all truncations of small
files (of the others one in 97 and all within the header). Every change must be refused.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from runs import OPTIONS, find_checkpoint, fork, train, wait, workplace

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.training.adapters import check_adapter

SMALL = 20_000


def changes(data: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Kinds of damage, and the damaged bytes."""
    is_tensors = data[8:9] == b"{"
    header = 8 + int.from_bytes(data[:8], "little") if is_tensors else len(data)
    bits = list(range(8 * header))
    bits += rng.sample(range(8 * header, 8 * len(data)), min(flips, 8 * (len(data) - header)))
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield "bits of the header" if bit < 8 * header else "bits of the data", bytes(damaged)
    step = 1 if len(data) < SMALL else 97
    for length in sorted({*range(0, len(data), step), *range(min(header, SMALL))}):
        yield "truncations", data[:length]
    for more in (b"\0", b" ", data):
        yield "longer", data + more


def damage(file: Path, check: Callable[[], object], flips: int, rng: random.Random) -> Counter:
    """Damage a file in all ways; counts what was tried and what was not refused."""
    data, counts = file.read_bytes(), Counter()
    for kind, damaged in changes(data, flips, rng):
        counts[f"{kind}, tried"] += 1
        file.write_bytes(damaged)
        try:
            check()
            accepted = True
        except EdgeLoraError:
            accepted = False
        counts[f"{kind}, NOT REFUSED"] += accepted
    file.write_bytes(data)
    check()
    return counts


def main(flips: int, seed: int) -> int:
    """Returns 1 if any damage was not refused."""
    rng, total = random.Random(seed), Counter()
    with workplace() as place:
        wait(fork(lambda: train(place, "run", **OPTIONS | {"iters": 4})))
        run = place / "run"
        top = run / "adapters.safetensors"
        total.update(report("adapter", top, damage(top, lambda: check_adapter(top), flips, rng)))
        folder = find_checkpoint(run).folder
        for file in sorted(folder.iterdir()):
            counts = damage(file, lambda: find_checkpoint(folder), flips, rng)
            total.update(report(f"checkpoint/{file.name}", file, counts))
    print(f"all: {dict(total)}")
    return int(any(n for kind, n in total.items() if "NOT" in kind))


def report(name: str, file: Path, counts: Counter) -> Counter:
    """Print the counts of a file; returns them."""
    print(f"{name} ({file.stat().st_size} bytes): {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    sys.exit(main(*numbers, *(4000, 0)[len(numbers) :]))
