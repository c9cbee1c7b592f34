"""Peak memory of a whole training step at the floor, on synthetic weights of real shapes.

    python benchmarks/floor.py --shape llama-3.2-3b --contexts 1024 2048
    python benchmarks/floor.py --shape llama-3.2-3b --contexts 4096 8192 --blocks 2 4
    python benchmarks/floor.py --shape qwen2.5-3b --contexts 4096 --blocks 2 --dtype bfloat16

    python benchmarks/floor.py --shape llama-3.3-70b --contexts 2048 --blocks 2 --dtype bfloat16 \\
        --stand-in

Every row is a process of its own. It writes a random 4-bit checkpoint of the shape once (group
64, scales and norms bfloat16, as published ones have), then makes steps: forward, exact loss on
30 % of the tokens, backward, AdamW on LoRA matrices of all linear layers, batch 1. `peak` is
`mx.get_peak_memory` over the last step, MLX's buffer cache off: all that MLX holds, weights,
adapters, gradients and optimizer state included. `footprint` is the largest resident set of the
process during that step (Linux), `goal` and `published` (arXiv 2606.19528, all four
techniques) are of the whole model. Without --blocks the model has its full depth.

A CPU multiplies bfloat16 at some 4 GFLOP/s, so long rows would take hours. With --stand-in
its products are made of the first 8 columns of what is multiplied: arrays of the same
shapes, made from and in the same arrays, whose values mean nothing. docs/memory.md sets rows
of both kinds beside each other.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np

from mlx_edgelora.benchmark.meters import peak_footprint
from mlx_edgelora.benchmark.published import CONTEXTS, ROWS, published
from mlx_edgelora.benchmark.shapes import SHAPES, checkpoint, default_cache
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.plan import Plan

MIB = 2**20
GOALS = {
    "llama-3.2-3b": dict(zip(CONTEXTS, [0.30, 0.36, 0.45, 0.65, 1.0], strict=True)),
    "qwen2.5-3b": dict(zip(CONTEXTS, [0.27, 0.31, 0.38, 0.55, 0.85], strict=True)),
}
# The least that a step takes, whatever the shape.
FLOOR = Plan(
    prefetch=False,
    adapters="paged",
    tile_tokens=256,
    mlp_bytes=16 * MIB,
    loss_bytes=16 * MIB,
    cache_bytes=16 * MIB,
)
# What the floor is compared with in time: nothing streamed, spilled, paged or tiled.
PLENTY = Plan(streamed_blocks=0, head="resident", inputs="memory", tile_tokens=4096)


def stand_in(*dtypes: mx.Dtype) -> None:
    """Let products of some dtypes be those of 8 columns, in this process, for good."""
    product, add_product = mx.array.__matmul__, mx.addmm

    def cut(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        long = a.dtype in dtypes and a.shape[-1] > 8
        return (a[..., :8], b[..., :8, :]) if long else (a, b)

    mx.array.__matmul__ = lambda a, b: product(*cut(a, b))
    mx.addmm = lambda c, a, b, *rest: add_product(c, *cut(a, b), *rest)


class Run:
    """One model under one plan, ready to make steps.

    Args:
        folder: of the checkpoint.
        plan: what is kept where.
        args: of the command line.
    """

    def __init__(self, folder: Path, plan: Plan, args: argparse.Namespace) -> None:
        lazy = open_model(str(folder), streamed=plan.streams, quantize=None, cache=folder)
        mx.random.seed(1)
        add_lora(lazy.model, -1, rank=args.rank)
        self._stack = ExitStack()
        settings = Settings(args.cache, args.dtype)
        self._engine = self._stack.enter_context(build_engine(lazy, plan, settings))
        self._meter, self.trained = self._engine.disk, self._engine.adapters
        self._optimizer = optimizers.AdamW(1e-4)
        self.trained.start(self._optimizer)

    def step(self, batch: Batch) -> dict[str, float]:
        """Make one step and measure it."""
        gc.collect()
        reset_footprint()
        mx.reset_peak_memory()
        before, start = self._meter.snapshot(), time.perf_counter()
        loss, _ = self._engine.backward(batch, self.trained.add)
        self.trained.update(self._optimizer, 1)
        after = self._meter.snapshot()
        return {
            "loss": loss.item(),
            "seconds": time.perf_counter() - start,
            "peak": mx.get_peak_memory() / MIB,
            "footprint": peak_footprint() / MIB,
            "read": (after.read_bytes - before.read_bytes) / MIB,
            "written": (after.written_bytes - before.written_bytes) / MIB,
        }

    def close(self) -> None:
        """Give memory and disk space back."""
        self._stack.close()


def reset_footprint() -> None:
    """Let Linux forget the largest resident set so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def random_batch(vocabulary: int, tokens: int, labelled: float) -> Batch:
    """One row of random tokens, the last share of them labelled."""
    row = np.random.RandomState(0).randint(0, vocabulary, (1, tokens + 1)).astype(np.int32)
    first = tokens - max(1, round(labelled * tokens))
    return Batch(row, np.arange(tokens)[None] >= first, (0,))


def measure(args: argparse.Namespace, blocks: int, tokens: int) -> dict[str, float]:
    """Make steps and give the last one's figures."""
    mx.set_cache_limit(0)
    if args.stand_in:
        stand_in(mx.bfloat16)
    run = Run(checkpoint(args.cache, args.shape, blocks), FLOOR, args)
    batch = random_batch(SHAPES[args.shape][-1], tokens, args.labelled)
    if args.limit:  # as a run has one from its plan
        mx.set_memory_limit(round(args.limit * MIB))
    for _ in range(args.steps):
        row = run.step(batch)
    run.close()
    return row


def speed(args: argparse.Namespace, blocks: int, tokens: int) -> dict[str, float]:
    """Time of the floor over that of a run that keeps everything, alternating."""
    mx.set_cache_limit(0)
    folder = checkpoint(args.cache, args.shape, blocks)
    batch = random_batch(SHAPES[args.shape][-1], tokens, args.labelled)
    runs = [Run(folder, plan, args) for plan in (FLOOR, PLENTY)]
    ratios, times = [], []
    for number in range(args.steps + 1):
        floor, plenty = (run.step(batch)["seconds"] for run in runs)
        if number:  # the first of each warms up
            ratios.append(floor / plenty)
            times.append((floor, plenty))
    for run in runs:
        run.close()
    best = [min(some) for some in zip(*times, strict=True)]
    return {
        "median": float(np.median(ratios)),
        "lowest": min(ratios),
        "highest": max(ratios),
        "of_fastest": best[0] / best[1],
    }


def main() -> None:
    """Measure every combination in a process of its own and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024])
    parser.add_argument("--blocks", type=int, nargs="+", help="all of the model's if absent")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--labelled", type=float, default=0.3, help="share of the tokens")
    parser.add_argument("--limit", type=float, help="MLX's memory limit in MiB")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--stand-in", action="store_true", help="for products of bfloat16")
    parser.add_argument("--speed", action="store_true", help="time against keeping everything")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder of checkpoints and spill files",
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    blocks = args.blocks or [SHAPES[args.shape][1]]
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.one:
        function = speed if args.speed else measure
        print(json.dumps(function(args, blocks[0], args.contexts[0])))
        return
    print(
        f"{args.shape}, rank {args.rank}, {args.dtype}, {args.labelled:.0%} labelled"
        + ", products by a stand-in" * args.stand_in
    )
    if args.speed:
        print(
            "| blocks | tokens | floor / keeping everything: median | lowest | highest | fastest |"
        )
        print("|---|---|---|---|---|---|")
    else:
        print(
            "| blocks | tokens | peak MiB | GiB | goal | published | footprint MiB | above peak |"
            " read | written |\n|---|---|---|---|---|---|---|---|---|---|"
        )
    for tokens in args.contexts:
        for count in blocks:
            print(f"| {count} | {tokens} | {cells(args, count, tokens)} |", flush=True)


def cells(args: argparse.Namespace, blocks: int, tokens: int) -> str:
    """One row, measured in a process of its own."""
    child = [sys.executable, __file__, "--one", "--shape", args.shape, "--blocks", str(blocks)]
    child += ["--contexts", str(tokens), "--rank", str(args.rank), "--dtype", args.dtype]
    child += ["--labelled", str(args.labelled), "--steps", str(args.steps)]
    child += ["--cache", str(args.cache)] + ["--speed"] * args.speed
    child += ["--stand-in"] * args.stand_in
    child += ["--limit", str(args.limit)] if args.limit else []
    out = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = json.loads(out.splitlines()[-1])
    if args.speed:
        return " | ".join(f"{row[k]:.2f}" for k in ("median", "lowest", "highest", "of_fastest"))
    tables = GOALS.get(args.shape, {}), published(args.shape, ROWS[-1])
    known = [table.get(tokens, "") for table in tables]
    figures = [f"{row['peak']:.1f}", f"{row['peak'] / 1024:.3f}", *known]
    figures += [f"{row['footprint']:.1f}", f"{row['footprint'] - row['peak']:.1f}"]
    return " | ".join(map(str, [*figures, f"{row['read']:.0f}", f"{row['written']:.0f}"]))


if __name__ == "__main__":
    main()
