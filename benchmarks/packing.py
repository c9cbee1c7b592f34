"""What packing gains: real tokens a second over short rows, packed and in padded batches.

Rows of so many tokens on average, packed into rows of `--tokens`, against the same rows in padded
batches: of one row, of four, and of as many as have as many tokens. All have the same budget.
Real tokens a second, padding not counted. Contenders take turns, and each turn is a batch of packed
rows or as many padded batches as have its tokens. Of each shape the first step, in which MLX
compiles, is not counted; of packed rows the second, either. A subcommand of `speed.py`.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np

from mlx_edgelora.benchmark import shapes
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.data import iterate_batches
from mlx_edgelora.data.batches import largest_batch, padding_share
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import this_machine
from mlx_edgelora.planner.search import plan
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

RANK = 8


class Rows:
    """Steps over short rows, in batches of one kind.

    Args:
        folder: of the model.
        rank: of the adapters.
        rows: of (tokens, offset).
        settings: of `iterate_batches`.
        budget: bytes.
        stack: closes the engine.
    """

    def __init__(
        self, folder: Path, rank: int, rows: list, settings: dict, budget: int, stack: ExitStack
    ) -> None:
        lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
        add_lora(lazy.model, -1, rank=rank)
        shape = shape_of(checked_blocks(lazy.model), lazy.vocabulary)
        most = largest_batch([rows], **settings)
        context = most.context if settings["packing"] else 0
        load = BatchShape(most.rows, most.tokens, most.labels, context)
        dtype = mx.float32 if shape.itemsize == mx.float32.size else mx.bfloat16
        machine = this_machine(folder.parent, folder.parent, dtype)
        choice = plan(shape, load, machine, budget)
        self._engine = stack.enter_context(build_engine(lazy, choice.plan, Settings(folder.parent)))
        self._optimizer = optimizers.AdamW(1e-5)
        self._engine.adapters.start(self._optimizer)
        self._batches = iterate_batches(rows, **settings, loop=True, seed=0)
        self._seen: Counter[Hashable] = Counter()
        self.padding = padding_share(rows, **settings, seed=0)
        self.words = f"{load.rows} x {load.tokens}: {choice.plan.summary(shape.blocks)}"

    def turn(self, least: int) -> "Turn":
        """Train on so many real tokens or more."""
        turn, held = Turn(), mx.get_active_memory()
        mx.reset_peak_memory()
        while turn.all_tokens < least:
            batch = next(self._batches)
            start = time.perf_counter()
            loss, count = self._engine.backward(batch, self._engine.adapters.add)
            self._engine.adapters.update(self._optimizer, 1)
            mx.synchronize()
            spent = time.perf_counter() - start
            tokens = count + len(batch.indices)  # the first token of a row is no label
            shape: Hashable = batch.inputs().shape
            compiling = 1
            if batch.starts is not None:  # attention's depends on the longest row
                longest = int((np.arange(batch.starts.shape[1]) - batch.starts).max())
                shape, compiling = (shape, longest.bit_length()), 2
            self._seen[shape] += 1
            turn.losses.append(loss.item())
            turn.all_tokens += tokens
            if self._seen[shape] > compiling:
                turn.tokens += tokens
                turn.seconds += spent
        turn.peak = mx.get_peak_memory() - held
        return turn


@dataclass
class Turn:
    """Steps that count, and all; the losses of all, and the peak beside what is held."""

    tokens: int = 0
    seconds: float = 0.0
    all_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    peak: int = 0


def compare_packing(args: argparse.Namespace) -> None:
    """Print real tokens a second of packed rows over those of padded batches."""
    args.cache.mkdir(parents=True, exist_ok=True)
    folder = shapes.checkpoint(args.cache, args.shape, args.blocks, args.weights)
    random = np.random.RandomState(0)
    drawn = random.lognormal(np.log(args.short_rows) - 0.18, 0.6, 4000)
    lengths = np.clip(drawn.round(), 8, args.tokens).astype(int)
    vocabulary = shapes.SHAPES[args.shape][-1]
    rows = [(random.randint(0, vocabulary, n).tolist(), 0) for n in lengths]
    print(f"rows of {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
    common = {"max_seq_length": args.tokens + 1}
    many = round(args.tokens / lengths.mean())
    sizes = {"packed": 1, "1 row": 1, "4 rows": 4, "as many tokens": many}
    with ExitStack() as stack:
        contenders = {
            name: Rows(
                folder,
                RANK,
                rows,
                common | {"batch_size": size, "packing": name == "packed"},
                int(args.budget * 1e9),
                stack,
            )
            for name, size in sizes.items()
        }
        found: dict[str, list[Turn]] = {name: [] for name in sizes}
        begin, least = time.monotonic(), args.tokens * 9 // 10
        for number in range(args.steps + 1):
            if number and time.monotonic() - begin > args.seconds:
                break
            for name, contender in contenders.items():
                turn = contender.turn(least)
                found[name].append(turn)
                print(f"{name}: {turn.tokens} of {turn.all_tokens} in {turn.seconds:.3f} s")
    rates = {name: rate(turns) for name, turns in found.items()}
    print(
        "| batches of | padding | real tokens a second over packed | counted | peak | mean loss |"
    )
    print("|---|---|---|---|---|---|")
    for name, turns in found.items():
        counted, every = sum(t.tokens for t in turns), sum(t.all_tokens for t in turns)
        losses = [loss for turn in turns for loss in turn.losses]
        print(
            f"| {name} | {contenders[name].padding:.0%} | {rates[name] / rates['packed']:.3f} | "
            f"{counted:,} of {every:,} | {max(t.peak for t in turns) / 1e6:.0f} MB | "
            f"{np.mean(losses):.3f} |"
        )
    for name, contender in contenders.items():
        print(f"{name}: {rates[name]:.0f} tokens a second; {contender.words}")


def rate(turns: list[Turn]) -> float:
    """Tokens a second of the steps that count."""
    seconds = sum(turn.seconds for turn in turns)
    return sum(turn.tokens for turn in turns) / seconds if seconds else math.nan
