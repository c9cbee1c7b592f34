"""Peak memory of a training step, and of attention, on random weights of real shapes.

    python benchmarks/memory.py floor --shape llama-3.2-3b --contexts 1024 2048
    python benchmarks/memory.py floor --shape llama-3.2-3b --contexts 4096 8192 --blocks 2 4
    python benchmarks/memory.py floor --shape llama-3.3-70b --contexts 2048 --blocks 2 \\
        --dtype bfloat16 --stand-in
    python benchmarks/memory.py floor --shape qwen3-30b-a3b --contexts 512 --blocks 2 --rank 8 \\
        --dtype bfloat16 --stand-in
    python benchmarks/memory.py floor --shape gemma-4-e4b --contexts 2048 --blocks 4 --rank 8 \\
        --dtype bfloat16 --stand-in --vocabulary 4096 --steps 1
    python benchmarks/memory.py time --shape llama-3.2-3b --contexts 1024 --blocks 2 --steps 5
    python benchmarks/memory.py depth --shape small --contexts 256 --blocks 4 16
    python benchmarks/memory.py attention 1024 2048

`floor` makes steps by the plan that takes the least by the planner's formula, as `--memory-budget
min` does: forward, exact loss on 30 % of the tokens, backward, AdamW on LoRA matrices of all linear
layers, batch 1. `expected` is the planner's peak. `time` sets such a step beside one
that keeps everything; the two alternate. `depth` is blocks read from disk with their inputs in a
file, beside `mlx.nn.value_and_grad` over the model in memory with the same kernels, every token
labelled. Each row is a process of its own, on a random 4-bit checkpoint of the shape that is
written once (group 64, scales and norms bfloat16, as published ones have). `peak` is
`mx.get_peak_memory` over the last step, MLX's buffer cache off: all that MLX holds, weights,
adapters, gradients and optimizer state included. `process` is the largest resident set during that
step (Linux), `published` (arXiv 2606.19528, all four techniques) is of the whole model. Without
--blocks the model has its full depth.

A CPU multiplies bfloat16 at some 4 GFLOP/s, so long rows would take hours. With --stand-in products
are made of the first 8 columns of what is multiplied (of the first group, where experts are
packed): arrays of the same shapes, made from and in the same arrays, whose values mean nothing. The
trials of blocks, before the step, multiply in float32. docs/memory.md sets rows of both kinds
beside each other. With --vocabulary the head, which is read and multiplied by tiles, has fewer
words: its memory is the same, its time is not.

`attention` is forward and backward with heads of Llama-3.2-3B (24 query heads, 8 key heads, head
size 128), causal, float32: in tiles and MLX's own, which needs 6.4 GB at 4096 tokens on a CPU and
is left out with --tiles. Peaks are above the inputs. The ways alternate three times and the
shortest counts.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.benchmark.meters import peak_footprint
from mlx_edgelora.benchmark.published import ROWS, published
from mlx_edgelora.benchmark.shapes import SHAPES, checkpoint, default_cache
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.layers.attention import tiled_attention
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import DTYPES, open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import Machine, this_machine
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.search import expected, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

FLOOR = "floor"
# What the floor is compared with in time: nothing streamed, spilled, paged or tiled.
PLENTY = Plan(streamed_blocks=0, head="resident", inputs="memory", tile_tokens=4096)
PLANS = {
    FLOOR: None,  # the plan that takes the least
    "block by block": Plan(prefetch=False, kernel="dequantize"),
    "plain MLX": Plan(streamed_blocks=0, head="resident", inputs="memory", kernel="dequantize"),
}
HEADS, KV_HEADS, HEAD_SIZE = 24, 8, 128


PRODUCT, ADD_PRODUCT = mx.array.__matmul__, mx.addmm


def multiply_in_float32() -> None:
    """Let products of bfloat16 be made in float32, in this process, until `stand_in`.

    The trials of blocks need their values, and a CPU is many times as fast in float32.
    """

    def wide(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        narrow = mx.bfloat16 in (a.dtype, b.dtype)
        return (a.astype(mx.float32), b.astype(mx.float32)) if narrow else (a, b)

    def product(a: mx.array, b: mx.array) -> mx.array:
        return PRODUCT(*wide(a, b)).astype(a.dtype)

    def add_product(c: mx.array, a: mx.array, b: mx.array, *rest: float) -> mx.array:
        return ADD_PRODUCT(c, *wide(a, b), *rest).astype(c.dtype)

    mx.array.__matmul__, mx.addmm = product, add_product


def stand_in(*dtypes: mx.Dtype) -> None:
    """Let products of some dtypes be those of 8 columns, in this process, for good."""
    product, add_product = PRODUCT, ADD_PRODUCT

    def cut(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        long = a.dtype in dtypes and a.shape[-1] > 8
        return (a[..., :8], b[..., :8, :]) if long else (a, b)

    mx.array.__matmul__ = lambda a, b: product(*cut(a, b))
    mx.addmm = lambda c, a, b, *rest: add_product(c, *cut(a, b), *rest)
    gather, gather_packed = mx.gather_mm, mx.gather_qmm
    mx.gather_mm = lambda a, b, **rest: gather(*((a[..., :8], b[..., :8, :])), **rest)

    def gather_group(
        x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None, **rest: Any
    ) -> mx.array:
        size = rest["group_size"]
        ends = size, size * rest["bits"] // 32, 1, 1
        arrays = x, w, scales, biases
        cut = [a if a is None else a[..., :end] for a, end in zip(arrays, ends, strict=True)]
        return gather_packed(*cut, **rest)

    mx.gather_qmm = gather_group


class Run:
    """One model under one plan, ready to make steps.

    Args:
        folder: of the checkpoint.
        plan: what is kept where; None for the least.
        args: of the command line.
        batch: what it computes.

    Attributes:
        expected: the peak by the planner's formula.
    """

    def __init__(
        self, folder: Path, plan: Plan | None, args: argparse.Namespace, batch: Batch
    ) -> None:
        streams = plan is None or plan.streams
        lazy = open_model(str(folder), streamed=streams, quantize=None, cache=folder)
        mx.random.seed(1)
        add_lora(lazy.model, -1, rank=args.rank)
        arguments = planner_arguments(lazy, args, batch)
        plan = with_settings(plan or smallest(*arguments).plan, args)
        self.expected = expected(*arguments, plan).peak
        self._plan = plan
        self._stack = ExitStack()
        settings = Settings(args.cache, args.dtype)
        self._engine = self._stack.enter_context(build_engine(lazy, plan, settings))
        self._meter, self._trained = self._engine.disk, self._engine.adapters
        self._optimizer = optimizers.AdamW(1e-4)
        self._trained.start(self._optimizer)
        is_plain = plan == PLANS["plain MLX"]
        self._backward = plain(lazy.model) if is_plain else self._engine.backward

    def step(self, batch: Batch) -> dict[str, float]:
        """Make one step and measure it; bytes and seconds."""
        gc.collect()
        reset_footprint()
        mx.reset_peak_memory()
        before, start = self._meter.snapshot(), time.perf_counter()
        loss, _ = self._backward(batch, self._trained.add)
        self._trained.update(self._optimizer, 1)
        after = self._meter.snapshot()
        return {
            "loss": loss.item(),
            "seconds": time.perf_counter() - start,
            "peak": mx.get_peak_memory(),
            "process": peak_footprint(),
            "read": after.read_bytes - before.read_bytes,
            "written": after.written_bytes - before.written_bytes,
        }

    def try_tiles(self) -> None:
        """Find out which blocks are computed by tiles."""
        print(f"tiles: {self._engine.walk.tiling}", file=sys.stderr)
        print(self._plan.describe(len(self._engine.walk.blocks)), file=sys.stderr)

    def close(self) -> None:
        """Give memory and disk space back."""
        self._stack.close()


def planner_arguments(
    lazy: LazyModel, args: argparse.Namespace, batch: Batch
) -> tuple[ModelShape, BatchShape, Machine]:
    """What the planner is told of a run."""
    dtype = DTYPES[args.dtype]
    shape = shape_of(checked_blocks(lazy.model), lazy.vocabulary, dtype)
    rows, tokens = batch.tokens.shape
    load = BatchShape(rows, tokens - 1, int(batch.mask.sum()))
    return shape, load, this_machine(args.cache, args.cache, dtype)


def with_settings(plan: Plan, args: argparse.Namespace) -> Plan:
    """A plan with the settings that the command line names."""
    names = ("tile_tokens", "mlp_bytes", "mlp_weights", "key_tokens", "loss_bytes")
    given = {name: getattr(args, name, None) for name in names}
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def plain(model: nn.Module) -> Callable:
    """MLX's own autodiff over the whole model, called as `Engine.backward` is."""

    def loss(inputs: mx.array, labels: mx.array, mask: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(inputs), labels) * mask
        return losses.sum() / mask.sum()

    gradient = nn.value_and_grad(model, loss)

    def run(batch: Batch, sink: Callable[[dict[str, mx.array]], None]) -> tuple[mx.array, int]:
        arrays = map(mx.array, (batch.inputs(), batch.labels(), batch.mask))
        value, gradients = gradient(*arrays)
        mx.eval(value, gradients)
        sink(dict(tree_flatten(gradients)))
        return value, int(batch.mask.sum())

    return run


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


def measured(args: argparse.Namespace, blocks: int, tokens: int) -> dict[str, float]:
    """Figures of the last of some steps by a plan, in this process."""
    mx.set_cache_limit(0)
    words = args.vocabulary or SHAPES[args.shape][-1]
    folder = checkpoint(args.cache, args.shape, blocks, vocabulary=words)
    batch = random_batch(words, tokens, args.labelled)
    if args.stand_in:
        multiply_in_float32()
    run = Run(folder, PLANS[args.row], args, batch)
    run.try_tiles()  # before products mean nothing
    if args.stand_in:
        stand_in(mx.bfloat16, mx.float32)
    for _ in range(args.steps):
        row = run.step(batch)
    row["expected"] = run.expected
    run.close()
    return row


def ratios(args: argparse.Namespace, blocks: int, tokens: int) -> dict[str, float]:
    """Time of the floor over that of a run that keeps everything, alternating."""
    mx.set_cache_limit(0)
    folder = checkpoint(args.cache, args.shape, blocks)
    batch = random_batch(SHAPES[args.shape][-1], tokens, args.labelled)
    runs = [Run(folder, plan, args, batch) for plan in (PLANS[FLOOR], PLENTY)]
    times = [[run.step(batch)["seconds"] for run in runs] for _ in range(args.steps + 1)][1:]
    for run in runs:
        run.close()
    found = [floor / plenty for floor, plenty in times]
    fastest = [min(some) for some in zip(*times, strict=True)]
    return {
        "median": float(np.median(found)),
        "lowest": min(found),
        "highest": max(found),
        "fastest": fastest[0] / fastest[1],
    }


def own_process(args: argparse.Namespace, row: str, blocks: int, tokens: int) -> dict[str, float]:
    """One row, measured in a process of its own."""
    child = [sys.executable, __file__, args.command, "--row", row, "--shape", args.shape]
    child += ["--blocks", str(blocks), "--contexts", str(tokens), "--rank", str(args.rank)]
    child += ["--dtype", args.dtype, "--labelled", str(args.labelled), "--steps", str(args.steps)]
    child += ["--cache", str(args.cache)] + ["--stand-in"] * args.stand_in
    names = ("tile_tokens", "mlp_bytes", "mlp_weights", "key_tokens", "loss_bytes", "vocabulary")
    for name in names:
        if value := getattr(args, name, None):
            child += ["--" + name.replace("_", "-"), str(value)]
    out = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def steps(args: argparse.Namespace) -> None:
    """Measure every combination and print a Markdown table."""
    blocks = args.blocks or [SHAPES[args.shape][1]]
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.row:
        function = ratios if args.command == "time" else measured
        print(json.dumps(function(args, blocks[0], args.contexts[0])))
        return
    print(
        f"{args.shape}, rank {args.rank}, {args.dtype}, {args.labelled:.0%} labelled"
        + ", products by a stand-in" * args.stand_in
        + (f", {args.vocabulary} words" if args.command != "time" and args.vocabulary else "")
    )
    rows = ("block by block", "plain MLX") if args.command == "depth" else ("floor",)
    columns = ("peak", "expected", "process", "read", "written", "published GB")
    if args.command == "time":
        columns = ("floor / keeping everything: median", "lowest", "highest", "fastest")
    print(f"| plan | blocks | tokens | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 3) + "|")
    for row in rows:
        for tokens in args.contexts:
            for count in blocks:
                found = own_process(args, row, count, tokens)
                if args.command == "time":
                    cells = [f"{found[name]:.2f}" for name in ("median", *columns[1:])]
                else:
                    cells = [size(found[name]) for name in columns[:-1]]
                    cells.append(str(published(args.shape, ROWS[-1]).get(tokens, "")))
                print(f"| {row} | {count} | {tokens} | {' | '.join(cells)} |", flush=True)


def attention(args: argparse.Namespace) -> None:
    """Print a line for every size of the tiles."""
    mx.set_cache_limit(0)
    mx.random.seed(0)
    for tokens in args.tokens:
        shapes = [(1, heads, tokens, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        *arrays, cotangent = (mx.random.normal(shape) for shape in shapes)
        mx.eval(arrays, cotangent)
        options = {"scale": HEAD_SIZE**-0.5, "mask": "causal"}
        ways: dict[str, Callable] = {}
        if not args.tiles:
            ways["MLX"] = lambda *x, o=options: mx.fast.scaled_dot_product_attention(*x, **o)
        for tile in (MIB // 2, MIB, 2 * MIB, 4 * MIB, 8 * MIB):
            ways[f"tiles of {size(tile)}"] = lambda *x, tile=tile, o=options: tiled_attention(
                *x, **o, tile_bytes=tile
            )
        found: dict[str, list] = {name: [] for name in ways}
        for _ in range(3):
            for name, attend in ways.items():
                found[name].append(attended(attend, arrays, cotangent))
        held = 2 * sum(x.nbytes for x in arrays[:2])
        print(f"{tokens} tokens; output and gradients are {size(held)}")
        for name, runs in found.items():
            peaks, times = zip(*runs, strict=True)
            print(f"  {name}: peak {size(max(peaks))}, {min(times):.2f} s", flush=True)


def attended(attend: Callable, arrays: list[mx.array], cotangent: mx.array) -> tuple[int, float]:
    """Bytes above what is there before, and seconds."""
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(mx.vjp(attend, arrays, [cotangent]))
    return mx.get_peak_memory() - before, time.perf_counter() - start


def main() -> None:
    """Run a subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, labelled, count in (
        ("floor", "the least memory of a step", 0.3, 2),
        ("time", "what the least memory costs in time", 0.3, 5),
        ("depth", "peak by the number of blocks, beside plain MLX", 1.0, 2),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("--shape", choices=SHAPES, default="small")
        one.add_argument("--contexts", type=int, nargs="+", default=[1024])
        one.add_argument("--blocks", type=int, nargs="+", help="all of the model's if absent")
        one.add_argument("--rank", type=int, default=16)
        one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
        one.add_argument("--labelled", type=float, default=labelled, help="share of the tokens")
        one.add_argument("--steps", type=int, default=count)
        if name != "time":
            one.add_argument("--vocabulary", type=int, help="fewer words than the model has")
            for setting in ("tile-tokens", "mlp-bytes", "key-tokens", "loss-bytes"):
                one.add_argument(f"--{setting}", type=int, help="of each plan, not the planner's")
            choices = ("block", "rows")
            one.add_argument("--mlp-weights", choices=choices, help="of each plan")
        one.add_argument("--stand-in", action="store_true", help="for products of the dtype")
        one.add_argument("--cache", type=Path, default=default_cache(), help="of random models")
        one.add_argument("--row", choices=PLANS, help=argparse.SUPPRESS)
        one.set_defaults(run=steps)
    one = commands.add_parser("attention", help="attention in tiles, beside MLX's own")
    one.add_argument("tokens", type=int, nargs="+")
    one.add_argument("--tiles", action="store_true", help="leave MLX's own out")
    one.set_defaults(run=attention)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
