"""Time: of steps beside mlx-lm's, of the host alone, of reading weights, of products.

    python benchmarks/speed.py steps --output out --plain-mlx
    python benchmarks/speed.py steps --output out
    python benchmarks/speed.py steps --shape small --blocks 4 --tokens 64 --budgets plenty min
    taskset -c 0 python benchmarks/speed.py host --rounds 30
    python benchmarks/speed.py kinds --shapes qwen3-moe-small deepseek-small --blocks 2
    python benchmarks/speed.py reading --shape llama-3.2-3b --blocks 4
    LD_PRELOAD=libopenblas.so.0 python benchmarks/speed.py products
    python benchmarks/speed.py packing --shape llama-3.2-1b --blocks 4 --tokens 1024 --short-rows 84

`steps` is the table of a GPU: peak and seconds of a step within some budgets, beside mlx-lm's. A
row ends after `--seconds` with the steps it has; one that fails costs its own figures alone. The
table is written after every row, with every step's seconds in `steps.jsonl`. All rows share a
process, because imports take longer than the steps; only mlx-lm's, with --plain-mlx, have one of
their own, in which MLX has its own settings. The table has the rows of both. The peak is that of
everything since the row began, planning and measuring included; `of steps` that since training
began, which a run reports. What the rows before it left in memory counts; `steps.jsonl` has it.
Shape, tokens, rank, rows and start matrices are the same for all. Ratios are of medians; a GPU
that nobody else uses is steady enough for that. (`mlx-edgelora benchmark` takes turns, and checks
that all compute the same.)

`host` is what Python takes, for which a fast GPU waits: 28 blocks of 64 entries, 64 tokens,
float32. All steps are whole ones: loss, gradients, whether these are finite, AdamW. Contenders take
turns in one process, a step each; ratios are of steps that followed one another, and the median is
told.

`kinds` makes the same steps of random float32 models of some shapes, mixtures of experts and
hybrids among them. Ratios are of the shortest steps.

`reading` reads blocks of a shape again and again from a warm cache: in turn by `StreamedWeights`
(with every check and the dictionary that a step gets), by `mx.load`, and as many bytes by one
`preadv` into memory that is used again.

`products` is how a CPU multiplies: MLX's fused quantized kernel against dequantize and multiply,
best of three, 1024 rows by a 3072 x 3072 matrix, 4-bit in groups of 64. Errors are relative to
float32.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mlx_edgelora.mlx_settings import PLAIN, unset_defaults

if PLAIN in sys.argv:
    unset_defaults()

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from memory import random_batch
from mlx_lm.models import llama
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from packing import compare_packing

from mlx_edgelora.benchmark import contenders, rows, shapes
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.machine import commit
from mlx_edgelora.benchmark.meters import whole_peak
from mlx_edgelora.benchmark.run import write_start
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.finite import Magnitudes
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import DiskMeter, peak_memory
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.loading import attach, open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import this_machine
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

RIVALS = ("mlx-lm", "mlx-lm, checkpointing")
RANK = 8
# The model of `host`.
BLOCKS, TOKENS = 28, 64
RESIDENT = Plan(streamed_blocks=0, head="resident", inputs="memory", loss_bytes=160 * MIB)
PLANS = {
    "no limit": Plan(**(vars(RESIDENT) | {"kept_blocks": BLOCKS})),
    "all in memory, blocks recomputed": RESIDENT,
    "min": None,
}
PACKING = {"group_size": 64, "bits": 4}


class LateError(Exception):
    """A row has had its seconds."""


def job_of(args: argparse.Namespace, row: str, work: Path) -> TrainingJob:
    """Steps of one contender on random rows."""
    folder = shapes.checkpoint(args.cache, args.shape, args.blocks, args.weights)
    shapes.add_tokenizer(folder, shapes.SHAPES[args.shape][-1])
    (work / "data").mkdir()
    tokenizer, words = rows.tokenizer_of(folder), rows.words_for(folder)
    made = rows.synthetic_rows(tokenizer, 2, args.tokens, 0.3, words)
    masked, options = rows.write_rows(work / "data", made), {}
    opened = open_model(str(folder), streamed=False, quantize=None, cache=args.cache)
    write_start(opened, RANK, work / "start.safetensors")
    if row not in RIVALS:
        words = {"plenty": contenders.PLENTY, "min": "min"}
        budget = words.get(row) or round(float(row) * 1e9)
        options = {"memory_budget": budget, "spill_dir": str(work)}
    return TrainingJob(
        model=str(folder),
        data=str(work / "data"),
        start=str(work / "start.safetensors"),
        context=args.tokens,
        batch=1,
        steps=args.steps,
        rank=RANK,
        scale=20.0,
        learning_rate=1e-4,
        mask_prompt=masked,
        last=args.steps,
        output=str(work),
        checkpointing=row == RIVALS[1],
        options=options,
    )


def measured(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """Steps of one contender."""
    job = job_of(args, row, Path(tempfile.mkdtemp(prefix="edgelora-")))
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    held, of_steps = mx.get_active_memory(), 0
    times: list[float] = []
    losses: list[float] = []
    began = last = time.perf_counter()

    def pause(loss: float, trained: dict | None = None, disk: object = None) -> None:
        nonlocal last, of_steps
        if trained is not None:
            mx.eval(list(trained.values()))
        mx.synchronize()
        times.append(time.perf_counter() - last)
        losses.append(loss)
        of_steps = peak_memory() if row not in RIVALS else mx.get_peak_memory()
        if time.perf_counter() - began > args.seconds:
            raise LateError
        last = time.perf_counter()

    block = shapes.SHAPES[args.shape][0].TransformerBlock
    call = block.__call__
    with whole_peak() as peak:
        try:
            (contenders.mlx_lm if row in RIVALS else contenders.mlx_edgelora)(job, pause)
        except LateError:
            print(f"{row}: ended after {len(times)} steps", flush=True)
        finally:
            block.__call__ = call  # mlx-lm's checkpointing exchanges it for good
    return {
        "row": row,
        "tokens": args.tokens,
        "held": held,
        "peak": peak.bytes,
        "of_steps": of_steps,
        "first_s": times[0],
        "median_s": statistics.median(times[2:] or times),
        "times": times,
        "losses": losses,
    }


def table(found: list[dict[str, Any]], tokens: int, device: str) -> str:
    """What was measured so far."""
    by_row = {one["row"]: one for one in found}
    lines = [f"{device}, commit {commit()}, {tokens} tokens, 30 % labelled, rank {RANK}", ""]
    lines += ["| row | peak | of steps | s a step | first s | over mlx-lm | checkpointing | loss |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in found:
        ratios = [
            f"{one['median_s'] / by_row[rival]['median_s']:.2f}" if rival in by_row else "-"
            for rival in RIVALS
        ]
        losses = f"{one['losses'][0]:.4f} to {one['losses'][-1]:.4f}"
        budget = "" if one["row"] in (*RIVALS, "plenty", "min") else " GB"
        lines.append(
            f"| {one['row']}{budget} | {size(one['peak'])} | {size(one['of_steps'])} | "
            f"{one['median_s']:.3f} | "
            f"{one['first_s']:.1f} | {ratios[0]} | {ratios[1]} | {losses} |"
        )
    return "\n".join(lines) + "\n"


def steps(args: argparse.Namespace) -> None:
    """Measure the rows one after the other; the table is written after each."""
    args.cache.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "steps.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [row for row in map(json.loads, lines) if row["tokens"] == args.tokens]
    device = str(mx.device_info().get("device_name", mx.default_device()))
    for row in RIVALS if args.plain_mlx else args.budgets:
        try:
            found.append(measured(args, row))
        except (EdgeLoraError, RuntimeError, MemoryError, ValueError, OSError, IndexError) as error:
            print(f"{row}: nothing measured: {error}", flush=True)
            continue
        with file.open("a") as rows_file:
            rows_file.write(json.dumps(found[-1]) + "\n")
        (args.output / f"{args.tokens}.md").write_text(table(found, args.tokens, device))
    print(table(found, args.tokens, device))


def theirs(folder: Path, batch: Batch, checkpointing: bool) -> Callable[[], float]:
    """mlx-lm's step as in `mlx_lm.tuner.trainer.train`; gives its loss.

    With `checkpointing`, as far as mlx-lm has it: the blocks of the first one's class.
    """
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": 20.0, "dropout": 0.0})
    model.train()
    kind = type(model.layers[0])
    call = kind.__call__
    if checkpointing:
        trainer.grad_checkpoint(model.layers[0])
    optimizer = optimizers.AdamW(1e-5)
    value_and_grad = nn.value_and_grad(model, trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = value_and_grad(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss

    tokens = mx.array(batch.tokens)
    first = int(batch.mask.argmax())  # of the only row, whose labels are its last tokens
    lengths = mx.array([[first + 1, batch.tokens.shape[1]]])

    def run() -> float:
        loss = step(tokens, lengths)
        mx.eval(state, loss)
        return loss.item()

    for _ in range(2):  # it is traced again once the optimizer has a state
        run()
    kind.__call__ = call  # it is exchanged for all models for good; the compiled step keeps it
    return run


def ours(
    folder: Path, plan: Plan | None, batch: Batch, stack: ExitStack, vocabulary: int
) -> Callable[[], float]:
    """This package's step by a plan; None for the least memory."""
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    mx.random.seed(1)
    add_lora(lazy.model, -1, rank=RANK)
    if plan is None:
        shape = shape_of(checked_blocks(lazy.model), vocabulary)
        load = BatchShape(1, batch.mask.shape[1], int(batch.mask.sum()))
        plan = smallest(shape, load, this_machine(folder, folder, mx.float32)).plan
    engine = stack.enter_context(build_engine(lazy, plan, Settings(folder)))
    optimizer, magnitudes = optimizers.AdamW(1e-5), Magnitudes()
    engine.adapters.start(optimizer)

    def take(gradients: dict[str, mx.array]) -> None:
        engine.adapters.add(gradients, magnitudes.add)

    def step() -> float:
        loss, _ = engine.backward(batch, take)
        value = loss.item()
        assert magnitudes.first_bad() is None
        magnitudes.clear()
        engine.adapters.update(optimizer, 1)
        return value

    step()
    return step


def host(args: argparse.Namespace) -> None:
    """Print the time of steps whose arithmetic is next to nothing."""
    shapes.SHAPES["thin"] = (llama, BLOCKS, 64, 128, 4, 2, 1024)
    folder = shapes.checkpoint(args.cache, "thin", BLOCKS, "float32")
    times = beside(folder, random_batch(1024, TOKENS, 0.3), PLANS, args.rounds, 1024)
    print("| who | ms a step | over mlx-lm | over mlx-lm, checkpointing |\n|---|---|---|---|")
    for name, own in times.items():
        ratios = [
            statistics.median(mine / other for mine, other in zip(own, times[rival], strict=True))
            for rival in RIVALS
        ]
        print(
            f"| {name} | {1e3 * statistics.median(own):.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )


def beside(
    folder: Path, batch: Batch, plans: dict[str, Plan | None], rounds: int, vocabulary: int
) -> dict[str, list[float]]:
    """Seconds of steps of mlx-lm and of this package by some plans, in turn."""
    with ExitStack() as stack:
        every = {name: theirs(folder, batch, name != RIVALS[0]) for name in RIVALS}
        every |= {n: ours(folder, plan, batch, stack, vocabulary) for n, plan in plans.items()}
        return in_turn(every, rounds)


def kinds(args: argparse.Namespace) -> None:
    """Print a row for each shape."""
    plans = {name: PLANS[name] for name in ("no limit", "min")}
    names = (RIVALS[1], *plans)
    print(f"| shape | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for shape in args.shapes:
        words = shapes.SHAPES[shape][-1]
        folder = shapes.checkpoint(args.cache, shape, args.blocks, "float32")
        times = beside(folder, random_batch(words, args.tokens, 0.3), plans, args.rounds, words)
        shortest = {name: min(own) for name, own in times.items()}
        cells = [f"{shortest[name] / shortest[RIVALS[0]]:.2f}" for name in names]
        print(f"| {shape}, {args.blocks} blocks | {' | '.join(cells)} |", flush=True)


def in_turn(ways: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return times


def reading(args: argparse.Namespace) -> None:
    """Print bytes a second, and ratios of readings that followed one another."""
    args.cache.mkdir(parents=True, exist_ok=True)
    mx.set_cache_limit(0)
    folder = shapes.checkpoint(args.cache, args.shape, args.blocks)
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    add_lora(lazy.model, 1)
    weights = attach(lazy, streamed=True, dtype=None, meter=DiskMeter()).weights
    count = sum(array.nbytes for array in weights.block(0).values())
    shard = next(folder.glob("*.safetensors"))
    view, number = memoryview(np.zeros(count, np.uint8)), 0
    names = [name for name in mx.load(str(shard)) if ".layers.0." in name]
    with shard.open("rb", buffering=0) as file:

        def plain() -> None:
            done = 0
            while done < count:
                done += os.preadv(file.fileno(), [view[done:]], done)

        def streamed() -> None:
            nonlocal number
            number = (number + 1) % args.blocks
            weights.block(number)

        def loaded() -> None:
            arrays = mx.load(str(shard))
            mx.eval([arrays[name] for name in names])

        ways = {"preadv, memory used again": plain, "streamed": streamed, "mx.load": loaded}
        times = in_turn(ways, args.rounds)
    weights.close()
    print(f"a block of {size(count)}\n\n| way | GB/s | of preadv's speed |\n|---|---|---|")
    first, *_ = times.values()
    for name, own in times.items():
        share = statistics.median(a / b for a, b in zip(first, own, strict=True))
        print(f"| {name} | {count / statistics.median(own) / 1e9:.2f} | {share:.2f} |")


def products(args: argparse.Namespace) -> None:
    """Print times in float32 and errors in bfloat16."""
    x = mx.random.normal((1024, 3072), key=mx.random.key(0))
    matrix = mx.random.normal((3072, 3072), key=mx.random.key(1))
    packed = mx.quantize(matrix, **PACKING)
    mx.eval(x, matrix, packed)
    ways = {
        "float32 product": lambda: mx.eval(x @ matrix.T),
        "fused quantized": lambda: mx.eval(mx.quantized_matmul(x, *packed, **PACKING)),
        "dequantize, multiply": lambda: mx.eval(x @ mx.dequantize(*packed, **PACKING).T),
    }
    print(f"preloaded: {os.environ.get('LD_PRELOAD') or 'nothing'}")
    for name, times in in_turn(ways, 4).items():
        print(f"{name}: {min(times[1:]):.3f} s")
    weight, *rest = packed
    low = [weight, *(array.astype(mx.bfloat16) for array in rest)]
    exact = [weight, *(array.astype(mx.float32) for array in low[1:])]
    some = x[:16].astype(mx.bfloat16)
    expected = some.astype(mx.float32) @ mx.dequantize(*exact, **PACKING).T
    found = mx.quantized_matmul(some, *low, **PACKING), some @ mx.dequantize(*low, **PACKING).T
    errors = [
        (mx.linalg.norm(p.astype(mx.float32) - expected) / mx.linalg.norm(expected)).item()
        for p in found
    ]
    print(f"bfloat16 error: fused {errors[0]:.1%}, dequantized {errors[1]:.1%}")


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("steps", help="peak and seconds of steps, beside mlx-lm's")
    one.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.2-3b")
    one.add_argument("--blocks", type=int, default=28)
    one.add_argument("--tokens", type=int, default=1024)
    one.add_argument("--weights", choices=shapes.WEIGHTS, default="4bit")
    budgets = ["plenty", "3.7", "1.9", "1.0", "0.5", "min"]
    one.add_argument("--budgets", nargs="+", default=budgets, metavar="GB")
    one.add_argument(PLAIN, action="store_true", help="mlx-lm's rows instead of ours")
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--seconds", type=int, default=60, help="of a row at most")
    one.add_argument("--output", type=Path, default=Path("steps"))
    one.set_defaults(run=steps)
    one = commands.add_parser("host", help="what Python takes of a step")
    one.add_argument("--rounds", type=int, default=15)
    one.set_defaults(run=host)
    one = commands.add_parser("kinds", help="steps of models of several kinds, beside mlx-lm's")
    one.add_argument("--shapes", nargs="+", choices=shapes.SHAPES, required=True)
    one.add_argument("--blocks", type=int, default=2)
    one.add_argument("--tokens", type=int, default=256)
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(run=kinds)
    one = commands.add_parser("reading", help="weights from a warm cache")
    one.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.2-1b")
    one.add_argument("--blocks", type=int, default=3)
    one.add_argument("--rounds", type=int, default=20)
    one.set_defaults(run=reading)
    one = commands.add_parser("products", help="quantized products of a CPU")
    one.set_defaults(run=products)
    one = commands.add_parser("packing", help="what packing short rows gains")
    one.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.2-1b")
    one.add_argument("--blocks", type=int, default=4)
    one.add_argument("--tokens", type=int, default=1024)
    one.add_argument("--weights", choices=shapes.WEIGHTS, default="float32")
    one.add_argument("--short-rows", type=int, default=84, help="tokens of a row on average")
    one.add_argument("--steps", type=int, default=5)
    one.add_argument("--seconds", type=float, default=600, help="no turn begins after these")
    one.add_argument("--budget", type=float, default=1000, help="GB")
    one.set_defaults(run=compare_packing)
    for command in commands.choices.values():
        command.add_argument("--cache", type=Path, default=shapes.default_cache())
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
