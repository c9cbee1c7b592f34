"""Fit what a phase takes beside what it is known to hold, and write `memory/fitted.py`.

    python benchmarks/fit_cost.py --collect 150 --seed 1 --data steps.jsonl
    python benchmarks/fit_cost.py --collect 60 --real --seed 2 --data steps.jsonl
    python benchmarks/fit_cost.py --fit --data steps.jsonl

`--collect` makes steps by random plans of random shapes and records the peak of every phase.
Their products are made of the first 8 columns of what is multiplied, so that a step takes
seconds: the same arrays, without meaning. What MLX allocates ahead depends on how long products
take, so other steps have `--real` ones (but for most of bfloat16, as in the grid), of fewer tokens;
half of these are by plans that the planner chose for random budgets. They count eight times.
`--fit` solves for the smallest squared relative error with numbers that are not negative, where too
little counts more than too much, and prints how far off the phases and the peaks are. The grid of
docs/planner.md is made of other steps than these.
"""

import argparse
import dataclasses
import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path

import floor
import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import speed
from mlx_lm.models import llama, qwen2
from plans import Case, batch_of

from mlx_edgelora.benchmark.shapes import default_cache
from mlx_edgelora.memory import cost, fitted, profile
from mlx_edgelora.memory.machine import machine_here
from mlx_edgelora.memory.plan import MIB, Plan
from mlx_edgelora.memory.planner import plan, smallest
from mlx_edgelora.model import tiling
from mlx_edgelora.model.loading import DTYPES, open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.model.shape import ModelShape, shape_of
from mlx_edgelora.training.assembly import Settings, assembled

# Real widths with a small vocabulary: the head is the same for all, and slow.
SHAPES = {
    "l3b": (llama, 28, 3072, 8192, 24, 8, 8192),
    "l1b": (llama, 16, 2048, 8192, 32, 8, 8192),
    "q3b": (qwen2, 36, 2048, 11008, 16, 2, 8192),
    "q05b": (qwen2, 24, 896, 4864, 14, 2, 8192),
}
BLOCKS = [("l3b", 2), ("l3b", 3), ("l1b", 3), ("q3b", 2), ("q05b", 2), ("q05b", 4)]
LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048, 4096)
# Of real products on a CPU: longer rows take minutes.
REAL_TOKENS = {"q05b": 4096, "l1b": 1536, "q3b": 768, "l3b": 512, "llama-3.2-3b": 512}
# How much more a step of real products counts.
REAL_WEIGHT = 8
BACKWARD = ("recompute", "MLP backward", "attention backward", "backward")
# How much more than too much it costs to expect too little.
TOO_LITTLE = 1.3
# Terms that are dropped: fewer are easier to trust.
SMALLEST = 0.01


def random_case(draw: random.Random, real: bool) -> tuple[Case, bool, dict]:
    """A shape with a batch, whether it is quantized, and the choices of a plan.

    Empty choices are the planner's, for the case's budget.
    """
    shape, blocks = draw.choice([*BLOCKS, ("llama-3.2-3b", 2)])
    packed = shape == "llama-3.2-3b" or draw.random() < 0.7
    dtype = "bfloat16" if packed and draw.random() < 0.17 else "float32"
    longest = REAL_TOKENS[shape] if real and dtype == "float32" else 2048
    tokens = draw.choice([t for t in LENGTHS if t <= longest])
    rows = draw.choice([1, 1, 1, 2, 4])
    if rows * tokens > longest:
        rows = 1
    rank, labelled = draw.choice([4, 8, 16, 64]), draw.choice([0.1, 0.3, 1.0])
    planned = real and draw.random() < 0.5
    times = draw.choice([1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0]) if planned else None
    case = Case(shape, blocks, tokens, rows, rank, dtype, labelled, times)
    return case, packed, {} if planned else random_choices(draw, blocks, rows * tokens)


def random_choices(draw: random.Random, blocks: int, size: int) -> dict:
    """Any choices of a plan, for a batch of so many tokens."""
    choices: dict = {
        "streamed_blocks": draw.choice([None, None, 0, 1]),
        "head": draw.choice(["streamed", "resident"]),
        "prefetch": draw.random() < 0.5,
        "ram_blocks": draw.choice([None, 0]),
        "adapters": draw.choice(["resident", "paged"]),
        "loss_bytes": draw.choice([16, 40]) * MIB,
    }
    way = draw.choice(["kept", "kept", "whole", "whole", "tiles", "halves", "halves"])
    slices = draw.choice([None, 8 * MIB, 16 * MIB])
    if way == "kept":
        choices |= {"kept_blocks": draw.randint(1, blocks), "mlp_bytes": slices}
    elif way == "whole":
        choices |= {"mlp_bytes": slices}
    else:
        tiles = [t for t in (512, 1024, 2048) if t < size]
        choices |= {
            "tile_tokens": draw.choice([512, *tiles]),
            "mlp_bytes": draw.choice([4, 8, 16]) * MIB,
            "halves": way == "halves",
            "prefetch": choices["prefetch"] and way == "tiles",
        }
    return choices


class Collector:
    """Makes steps; what can be tiled is tried once for each kind of block."""

    def __init__(self, cache: Path) -> None:
        self._cache, self._known, self._kind = cache, {}, ""
        floor.SHAPES.update(SHAPES)
        real = tiling.Tiling._trial

        def trial(tiling: tiling.Tiling, index: int) -> tiling.Tileable:
            if self._kind not in self._known:
                self._known[self._kind] = real(tiling, index)
            return self._known[self._kind]

        tiling.Tiling._trial = trial

    def step(self, case: Case, packed: bool, choices: dict, real: bool) -> dict:
        """One step's phases, as a record."""
        make = floor.checkpoint if packed else speed.checkpoint
        folder = make(self._cache, case.shape, case.blocks)
        self._kind = f"{case.shape} {case.dtype} {packed}"
        lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
        add_lora(lazy.model, -1, rank=case.rank)
        shape = shape_of(lazy.model, lazy.vocabulary, DTYPES[case.dtype])
        batch = batch_of(case, lazy.vocabulary)
        warm = batch_of(dataclasses.replace(case, tokens=32), lazy.vocabulary)
        load = cost.Load(case.rows, case.tokens, int(batch.mask().sum()))
        if not choices:
            machine = machine_here(self._cache, self._cache, DTYPES[case.dtype])
            budget = round(case.times * smallest(shape, load, machine).needs)
            choices = dataclasses.asdict(plan(shape, load, machine, budget).plan)
        settings = Settings(self._cache, case.dtype)
        products = mx.array.__matmul__, mx.addmm
        with assembled(lazy, Plan(**choices), settings) as engine:
            optimizer = optimizers.AdamW(1e-4)
            engine.trained.start(optimizer)
            engine.backward(warm, engine.trained.add)
            engine.trained.update(optimizer, 1)
            gc.collect()
            mx.synchronize()
            if not real:
                floor.stand_in(mx.float32, mx.bfloat16)
            elif case.stands_in:
                floor.stand_in(mx.bfloat16)
            try:
                with profile.recording() as recorded:
                    profile.begin_step()
                    engine.backward(batch, engine.trained.add)
                    with profile.phase("update"):
                        engine.trained.update(optimizer, 1)
                    stretches = [dataclasses.astuple(s) for s in recorded.stretches]
            finally:
                mx.array.__matmul__, mx.addmm = products
        return {
            "shape": dataclasses.asdict(shape),
            "case": dataclasses.asdict(case),
            "labelled": load.labelled,
            "plan": choices,
            "real": real,
            "stretches": stretches,
        }


def memory_of(record: dict) -> cost.Memory:
    """The model's view of a recorded step."""
    case = record["case"]
    load = cost.Load(case["rows"], case["tokens"], record["labelled"])
    return cost.Memory(ModelShape(**record["shape"]), load, Plan(**record["plan"]))


def measured(record: dict) -> Iterator[tuple[cost.Phase, int]]:
    """The phases of the model with the peaks that were recorded for them."""
    by_visit: dict[tuple, list[list[int]]] = {}
    for name, block, _, peak in record["stretches"]:
        if name == "load":  # a visit of a block, or of one of its halves, begins
            for kind in ("forward", "backward"):
                by_visit.setdefault((kind, block), []).append([])
        elif name != "spill":
            kind = "backward" if name in BACKWARD else name
            visits = by_visit.setdefault((kind, block), [])
            if not visits:
                visits.append([])
            visits[-1].append(peak)
    for phase in memory_of(record).phases():
        visits = [visit for visit in by_visit.get((phase.name, phase.block), []) if visit]
        part = phase.kind.rpartition(", ")[2]
        if phase.name == "load" or not visits:
            continue
        if part in ("attention", "MLP") and len(visits) % 2 == 0:  # of each micro-batch two
            first = "attention" if phase.name == "forward" else "MLP"
            visits = visits[0::2] if part == first else visits[1::2]
        yield phase, max(max(visit) for visit in visits)


def solve(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with no negative numbers, by coordinate descent."""
    found, gram, right = np.zeros(terms.shape[1]), terms.T @ terms, terms.T @ wanted
    for _ in range(20000):
        moved = 0.0
        for j in np.flatnonzero(gram.diagonal()):
            value = max(0.0, found[j] + (right[j] - gram[j] @ found) / gram[j, j])
            moved, found[j] = max(moved, abs(value - found[j])), value
        if moved < 1e-9:
            break
    return found


def fit(records: list[dict]) -> dict[str, dict[str, float]]:
    """The numbers of every kind of phase; prints how far off they are."""
    groups: dict[str, list] = {}
    for record in records:
        for phase, peak in measured(record):
            times = REAL_WEIGHT if record.get("real") else 1
            groups.setdefault(phase.kind, []).extend([(phase, peak)] * times)
    result = {}
    for kind, group in sorted(groups.items()):
        names = sorted({name for phase, _ in group for name in phase.sizes})
        terms = np.array([[phase.sizes.get(n, 0.0) for n in names] for phase, _ in group])
        peaks = np.array([peak for _, peak in group], np.float64)
        weights = 1 / np.maximum(peaks, 20 * MIB)
        scale = np.abs(terms * weights[:, None]).max(axis=0)
        scale[scale == 0] = 1
        wanted = (peaks - [phase.held for phase, _ in group]) * weights
        scaled = terms * weights[:, None] / scale
        found = solve(scaled, wanted) / scale
        for _ in range(4):  # too little counts more than too much, which only wastes some budget
            more = np.where(scaled @ (found * scale) < wanted, TOO_LITTLE, 1.0)
            found = solve(scaled * more[:, None], wanted * more) / scale
        off = np.abs(terms @ found + [phase.held for phase, _ in group] - peaks) / peaks
        result[kind] = {
            name: round(float(value), 3)
            for name, value in zip(names, found, strict=True)
            if value >= SMALLEST
        }
        print(f"{kind}: {len(group)} phases, off by {np.median(off):.1%}, at most {off.max():.1%}")
    return result


def write(path: Path, numbers: dict[str, dict[str, float]]) -> None:
    """Write the module that holds them."""
    lines = [
        '"""Made by `benchmarks/fit_cost.py` from steps on a CPU, MLX 0.32.4: see there."""',
        "",
    ]
    lines += ["FITTED: dict[str, dict[str, float]] = {"]
    for kind, terms in numbers.items():
        lines += [f'    "{kind}": {{']
        lines += [f'        "{name}": {value},' for name, value in terms.items()]
        lines += ["    },"]
    path.write_text("\n".join([*lines, "}", ""]))


def main() -> None:
    """Collect or fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=int, default=0, metavar="STEPS")
    parser.add_argument("--real", action="store_true", help="products without a stand-in")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--cache", type=Path, default=default_cache())
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.collect:
        mx.set_cache_limit(0)
        draw, collector = random.Random(args.seed), Collector(args.cache)
        with open(args.data[0], "a") as file:
            for _ in range(args.collect):
                case = random_case(draw, args.real)
                file.write(json.dumps(collector.step(*case, args.real)) + "\n")
                file.flush()
    if args.fit:
        records = [json.loads(line) for path in args.data for line in path.open()]
        numbers = fit(records)
        write(Path(fitted.__file__), numbers)
        cost.FITTED = numbers
        off = []
        for record in records:
            peak = max(stretch[3] for stretch in record["stretches"])
            off.append(abs(memory_of(record).peak() / peak - 1))
        print(
            f"peaks of {len(off)} steps: off by {np.median(off):.1%}, within 5 % in "
            f"{np.mean(np.array(off) <= 0.05):.0%}, at most {max(off):.1%}"
        )


if __name__ == "__main__":
    main()
