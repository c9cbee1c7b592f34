"""Fit what a phase takes beside what it is known to hold, and write `planner/fitted.py`.

    python benchmarks/fit_cost.py --collect 150 --seed 1 --data steps.jsonl
    python benchmarks/fit_cost.py --collect 60 --real --seed 2 --data steps.jsonl
    python benchmarks/fit_cost.py --collect 45 --long --seed 3 --data steps.jsonl
    python benchmarks/fit_cost.py --fit --check --data benchmarks/results/fit-steps.jsonl.gz

`--collect` makes steps by random plans of random shapes and records the peak of every phase.
Their products are made of the first 8 columns of what is multiplied, so that a step takes
seconds: the same arrays, without meaning. What MLX allocates ahead depends on how long products
take, so other steps have `--real` ones (but for most of bfloat16, as in the grid), of fewer tokens;
half of these are by plans that the planner chose for random budgets. They count eight times.
`--long` makes real steps of long rows by tiles, of the small shape.
`--fit` solves for the smallest squared relative error with numbers that are not negative, where too
little counts more than too much, and prints how far off the phases and the peaks are. `--check`
prints how far off real steps are, in four parts, with the numbers fitted to the other three. The
grid of docs/planner.md is made of other steps than these.
"""

import argparse
import dataclasses
import gc
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import floor
import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import speed
from mlx_edgelora.memory import cost, fitted, profile
from mlx_lm.models import llama, qwen2
from plans import Case, batch_of

from mlx_edgelora.benchmark.shapes import default_cache
from mlx_edgelora.blocks import tiling
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.engine.build import Settings, assembled
from mlx_edgelora.model.loading import DTYPES, open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import machine_here
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import plan, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import ModelShape

# Real widths with a small vocabulary: the head is the same for all, and slow.
SHAPES = {
    "l3b": (llama, 28, 3072, 8192, 24, 8, 8192),
    "l1b": (llama, 16, 2048, 8192, 32, 8, 8192),
    "q3b": (qwen2, 36, 2048, 11008, 16, 2, 8192),
    "q05b": (qwen2, 24, 896, 4864, 14, 2, 8192),
}
BLOCKS = [("l3b", 2), ("l3b", 3), ("l1b", 3), ("q3b", 2), ("q05b", 2), ("q05b", 4)]
LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048, 4096)
# How blocks are computed.
WAYS = ("kept", "kept", "whole", "whole", "tiles", "halves", "halves")
# Of real products on a CPU: longer rows take minutes.
REAL_TOKENS = {"q05b": 4096, "l1b": 1536, "q3b": 768, "l3b": 512, "llama-3.2-3b": 512}
# How much more a step of real products counts.
REAL_WEIGHT = 8
BACKWARD = (*cost.STAGES, "backward")
# How much more than too much it costs to expect too little.
TOO_LITTLE = 1.3
# Kinds that peak at either of two moments, so that the larger of two sums is nearer: over four
# parts of the steps, each expected from the other three.
TWO_PEAKS = ("backward, slices", "forward, slices", "MLP backward by tiles, block")
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


def long_case(draw: random.Random) -> tuple[Case, bool, dict]:
    """As `random_case`, of long rows by tiles."""
    blocks, tokens = draw.choice([2, 4]), draw.choice([1536, 2048, 4096, 4096])
    rank, labelled = draw.choice([4, 8, 16, 64]), draw.choice([0.1, 0.3, 1.0])
    case = Case("q05b", blocks, tokens, 1, rank, "float32", labelled, None)
    choices = random_choices(draw, blocks, tokens, ("tiles", "tiles", "halves"))
    return case, draw.random() < 0.8, choices


def random_choices(draw: random.Random, blocks: int, size: int, ways: Sequence[str] = WAYS) -> dict:
    """Any choices of a plan, for a batch of so many tokens."""
    choices: dict = {
        "streamed_blocks": draw.choice([None, None, 0, 1]),
        "head": draw.choice(["streamed", "resident"]),
        "prefetch": draw.random() < 0.5,
        "ram_blocks": draw.choice([None, 0]),
        "adapters": draw.choice(["resident", "paged"]),
        "loss_bytes": draw.choice([16, 40]) * MIB,
    }
    way = draw.choice(ways)
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
        shape = shape_of(checked_blocks(lazy.model), lazy.vocabulary, DTYPES[case.dtype])
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


def read(path: Path) -> Iterator[dict]:
    """The records of a file, which may be packed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)


def memory_of(record: dict) -> cost.Memory:
    """The model's view of a recorded step."""
    case = record["case"]
    load = cost.Load(case["rows"], case["tokens"], record["labelled"])
    return cost.Memory(ModelShape(**record["shape"]), load, Plan(**record["plan"]))


def measured(record: dict) -> Iterator[tuple[cost.Phase, int]]:
    """The phases of the model with the peaks that were recorded for them."""
    by_visit: dict[tuple, list[list[tuple[str, int]]]] = {}
    for name, block, _, peak in record["stretches"]:
        if name == "load":  # a visit of a block, or of one of its halves, begins
            for kind in ("forward", "backward"):
                by_visit.setdefault((kind, block), []).append([])
        elif name != "spill":
            kind = "backward" if name in BACKWARD else name
            visits = by_visit.setdefault((kind, block), [])
            if not visits:
                visits.append([])
            visits[-1].append((name, peak))
    for phase in memory_of(record).phases():
        visits = [visit for visit in by_visit.get((phase.name, phase.block), []) if visit]
        stage, by_tiles, _ = phase.kind.partition(" by tiles")
        part = phase.kind.rpartition(", ")[2]
        if phase.name == "load" or not visits:
            continue
        if part in ("attention", "MLP") and len(visits) % 2 == 0:  # of each micro-batch two
            first = "attention" if phase.name == "forward" else "MLP"
            visits = visits[0::2] if part == first else visits[1::2]
        peaks = [peak for visit in visits for name, peak in visit if not by_tiles or name == stage]
        if peaks:
            yield phase, max(peaks)


def solve(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with no negative numbers (Lawson and Hanson's active sets)."""
    gram, right = terms.T @ terms, terms.T @ wanted
    found, used = np.zeros(len(right)), np.zeros(len(right), bool)
    for _ in range(3 * len(right)):
        slope = np.where(used, -np.inf, right - gram @ found)
        if slope.max() <= 1e-10 * np.abs(right).max():
            break
        used[slope.argmax()] = True
        while used.any():
            tried = np.zeros(len(right))
            inner = gram[np.ix_(used, used)]
            tried[used] = np.linalg.lstsq(inner, right[used], rcond=1e-12)[0]
            below = used & (tried <= 0)
            if not below.any():
                found = tried
                break
            steps = found[below] / (found[below] - tried[below] + 1e-300)
            found = found + steps.min() * (tried - found)
            used &= found > 1e-12
            found[~used] = 0
    return found


def one_sum(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`solve`, where too little counts more than too much, which only wastes some budget."""
    found = solve(terms, wanted)
    for _ in range(4):
        more = np.where(terms @ found < wanted, TOO_LITTLE, 1.0)
        found = solve(terms * more[:, None], wanted * more)
    return found


def two_sums(terms: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """The two sums whose larger one is nearest, of several starts.

    Each sum is fitted to the phases for which it was the larger one, until these are the same.
    """
    best, least = [one_sum(terms, wanted)], np.inf
    draw = np.random.default_rng(0)
    for _ in range(8):
        along = terms @ draw.normal(size=terms.shape[1])
        second = along > np.quantile(along, draw.uniform(0.2, 0.8))
        for _ in range(25):
            if min(second.sum(), (~second).sum()) < terms.shape[1]:
                break
            sums = [one_sum(terms[own], wanted[own]) for own in (~second, second)]
            one, other = (terms @ found for found in sums)
            over = np.maximum(one, other) - wanted
            loss = np.mean((over * np.where(over < 0, TOO_LITTLE, 1)) ** 2)
            if loss < least:
                best, least = sums, loss
            if (second == (other > one)).all():
                break
            second = other > one
    return best


def fit(records: list[dict], told: bool = True) -> dict[str, list[dict[str, float]]]:
    """The numbers of every kind of phase; prints how far off they are, if this is to be told."""
    groups: dict[str, list] = {}
    for record in records:
        for phase, peak in measured(record):
            times = REAL_WEIGHT if record.get("real") else 1
            groups.setdefault(phase.kind, []).append((phase, peak, times))
    result = {}
    for kind, group in sorted(groups.items()):
        names = sorted({name for phase, *_ in group for name in phase.sizes})
        terms = np.array([[phase.sizes.get(n, 0.0) for n in names] for phase, *_ in group])
        peaks = np.array([peak for _, peak, _ in group], np.float64)
        weights = np.sqrt([times for *_, times in group]) / np.maximum(peaks, 20 * MIB)
        held = np.array([phase.held for phase, *_ in group])
        scaled = terms * weights[:, None]
        scale = np.abs(scaled).max(axis=0)
        scale[scale == 0] = 1
        given = scaled / scale, (peaks - held) * weights
        sums = two_sums(*given) if kind in TWO_PEAKS else [one_sum(*given)]
        result[kind] = [
            {n: round(float(v), 3) for n, v in zip(names, s / scale, strict=True) if v >= SMALLEST}
            for s in sums
        ]
        found = np.max([terms @ (s / scale) for s in sums], axis=0)
        off = np.abs(found + held - peaks) / peaks
        if told:
            far = f"off by {np.median(off):.1%}, at most {off.max():.1%}"
            print(f"{kind}: {len(group)} phases, {far}")
    return result


def tell(name: str, records: list[dict], expected: list[int]) -> None:
    """Print how far off expected peaks are."""
    peaks = [max(stretch[3] for stretch in record["stretches"]) for record in records]
    off = np.abs(np.array(expected) / peaks - 1)
    print(
        f"{name} of {len(off)} steps: off by {np.median(off):.1%}, within 5 % in "
        f"{np.mean(off <= 0.05):.1%}, within 10 % in {np.mean(off <= 0.1):.1%}, "
        f"at most {off.max():.1%}"
    )


def check(records: list[dict]) -> None:
    """Expect each part of the real steps from the other three."""
    parts = np.random.default_rng(5).integers(0, 4, len(records))
    tested, expected = [], []
    for part in range(4):
        cost.FITTED = fit([r for r, p in zip(records, parts, strict=True) if p != part], False)
        own = [r for r, p in zip(records, parts, strict=True) if p == part and r.get("real")]
        tested += own
        expected += [memory_of(record).peak() for record in own]
    tell("peaks, cross-validated,", tested, expected)


def write(path: Path, numbers: dict[str, list[dict[str, float]]]) -> None:
    """Write the module that holds them."""
    lines = [
        '"""Made by `benchmarks/fit_cost.py` from steps on a CPU, MLX 0.32.4: see there."""',
        "",
    ]
    lines += ["FITTED: dict[str, list[dict[str, float]]] = {"]
    for kind, sums in numbers.items():
        lines += [f'    "{kind}": [']
        for terms in sums:
            lines += ["        {"]
            lines += [f'            "{name}": {value},' for name, value in terms.items()]
            lines += ["        },"]
        lines += ["    ],"]
    path.write_text("\n".join([*lines, "}", ""]))


def main() -> None:
    """Collect or fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=int, default=0, metavar="STEPS")
    parser.add_argument("--real", action="store_true", help="products without a stand-in")
    parser.add_argument("--long", action="store_true", help="real steps of long rows by tiles")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--check", action="store_true")
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
                case = long_case(draw) if args.long else random_case(draw, args.real)
                record = collector.step(*case, args.real or args.long)
                file.write(json.dumps(record) + "\n")
                file.flush()
    if not (args.fit or args.check):
        return
    records = [record for path in args.data for record in read(path)]
    if args.check:
        check(records)
    if args.fit:
        numbers = fit(records)
        write(Path(fitted.__file__), numbers)
        cost.FITTED = numbers
        tell("peaks", records, [memory_of(record).peak() for record in records])


if __name__ == "__main__":
    main()
