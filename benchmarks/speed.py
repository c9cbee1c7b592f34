"""Time of a step against mlx-lm's own, at budgets from its peak with checkpointing to plenty.

    python benchmarks/speed.py --shape llama-3.2-1b --blocks 4 --tokens 256
    python benchmarks/speed.py --shape llama-3.2-1b --blocks 4 --tokens 256 --labelled 0.3
    python benchmarks/speed.py --shape llama-3.2-1b --blocks 4 --tokens 1024 --short-rows 84

The last one compares this package with itself: rows of so many tokens on average, packed into rows
of `--tokens`, against the same rows in padded batches, of four and of as many as have as many
tokens. Real tokens a second, padding not counted; contenders take turns, and each turn is a batch
of packed rows or as many padded batches as have its tokens.

On an unquantized random model in float32, so that both multiply by the same kernels: MLX's own
product with a packed matrix is 20 times slower on a CPU than unpacking it, and only this package
unpacks. Same batch, same LoRA layers, AdamW. Contenders take turns; every ratio is of two
steps that followed one another. `peak` is `mx.get_peak_memory` of the last step, weights included,
MLX's buffer cache left as it is. mlx-lm's step is that of `mlx_lm.tuner.trainer.train`: its loss,
its compiled step, its gradient checkpointing.
"""

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import floor
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlx_edgelora.benchmark import shapes
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.data import Batch, iterate_batches
from mlx_edgelora.data.batches import largest_batch, padding_share
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import this_machine
from mlx_edgelora.planner.search import plan
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape

Step = Callable[[], float]
checkpoint = partial(shapes.checkpoint, weights="float32")


def theirs(folder: Path, rank: int, batch: Batch, checkpointing: bool) -> Step:
    """mlx-lm's step; gives its loss."""
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": 20.0, "dropout": 0.0})
    model.train()
    kind = type(model.layers[0])
    call = kind.__call__
    if checkpointing:
        trainer.grad_checkpoint(model.layers[0])
    optimizer = optimizers.AdamW(1e-5)
    value_and_grad = nn.value_and_grad(model, trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradients = value_and_grad(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss, count

    tokens = mx.array(batch.tokens)
    first = int(batch.mask.argmax())  # of the only row, whose labels are its last tokens
    lengths = mx.array([[first + 1, batch.tokens.shape[1]]])

    def run() -> float:
        loss, _ = step(tokens, lengths)
        mx.eval(state, loss)
        return loss.item()

    for _ in range(2):  # it is traced again once the optimizer has a state
        run()
    kind.__call__ = call  # it is exchanged for all models for good; the compiled step keeps it
    return run


def ours(folder: Path, rank: int, batch: Batch, budget: int, stack: ExitStack) -> tuple[Step, str]:
    """This package's step within a budget, and the plan in words."""
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    add_lora(lazy.model, -1, rank=rank)
    shape = shape_of(checked_blocks(lazy.model), lazy.vocabulary)
    load = BatchShape(*batch.inputs().shape, int(batch.mask.sum()))
    machine = this_machine(folder.parent, folder.parent, mx.float32)
    choice = plan(shape, load, machine, budget)
    settings = Settings(folder.parent)
    engine = stack.enter_context(build_engine(lazy, choice.plan, settings))
    optimizer = optimizers.AdamW(1e-5)
    engine.adapters.start(optimizer)

    def run() -> float:
        loss, _ = engine.backward(batch, engine.adapters.add)
        engine.adapters.update(optimizer, 1)
        return loss.item()

    return run, f"{choice.plan.describe(shape.blocks)}; {choice.peak / 1e6:.0f} MB expected"


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
        machine = this_machine(folder.parent, folder.parent, mx.float32)
        choice = plan(shape, load, machine, budget)
        self._engine = stack.enter_context(build_engine(lazy, choice.plan, Settings(folder.parent)))
        self._optimizer = optimizers.AdamW(1e-5)
        self._engine.adapters.start(self._optimizer)
        self._batches = iterate_batches(rows, **settings, loop=True, seed=0)
        self.padding = padding_share(rows, **settings, seed=0)
        self.words = f"{load.rows} x {load.tokens}: {choice.plan.summary(shape.blocks)}"

    def turn(self, least: int) -> tuple[float, float, int]:
        """Train on so many real tokens or more; gives them a second, their mean loss, the peak."""
        done, spent, losses = 0, 0.0, []
        mx.reset_peak_memory()
        while done < least:
            batch = next(self._batches)
            start = time.perf_counter()
            loss, count = self._engine.backward(batch, self._engine.adapters.add)
            self._engine.adapters.update(self._optimizer, 1)
            mx.synchronize()
            spent += time.perf_counter() - start
            losses.append(loss.item())
            done += count + len(batch.indices)  # the first token of a row is no label
        return done / spent, float(np.mean(losses)), mx.get_peak_memory()


def compare_packing(folder: Path, args: argparse.Namespace) -> None:
    """Print real tokens a second of packed rows over those of padded batches."""
    random = np.random.RandomState(0)
    drawn = random.lognormal(np.log(args.short_rows) - 0.18, 0.6, 4000)
    lengths = np.clip(drawn.round(), 8, args.tokens).astype(int)
    vocabulary = shapes.SHAPES[args.shape][-1]
    rows = [(random.randint(0, vocabulary, n).tolist(), 0) for n in lengths]
    print(f"rows of {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
    common = {"max_seq_length": args.tokens + 1}
    sizes = {"packed": 1, "4 rows": 4, "as many tokens": round(args.tokens / lengths.mean())}
    with ExitStack() as stack:
        contenders = {
            name: Rows(
                folder,
                args.rank,
                rows,
                common | {"batch_size": size, "packing": name == "packed"},
                int(args.budget * 1e9),
                stack,
            )
            for name, size in sizes.items()
        }
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in sizes}
        for number in range(args.steps + 1):
            for name, contender in contenders.items():
                turn = contender.turn(args.tokens * 9 // 10)
                if number:  # the first one compiles and reads
                    found[name].append(turn)
    print("| batches of | padding | real tokens a second over packed | peak MB | mean loss |")
    print("|---|---|---|---|---|")
    for name, turns in found.items():
        ratios = [own[0] / packed[0] for own, packed in zip(turns, found["packed"], strict=True)]
        print(
            f"| {name} | {contenders[name].padding:.0%} | {np.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) | {max(t[2] for t in turns) / 1e6:.0f} | "
            f"{np.mean([t[1] for t in turns]):.3f} |"
        )
    for name, contender in contenders.items():
        print(f"{name}: {contender.words}")


def timed(step: Step) -> tuple[float, int, float]:
    """Seconds, peak and loss of one step."""
    gc.collect()
    mx.synchronize()
    mx.reset_peak_memory()
    start = time.perf_counter()
    loss = step()
    mx.synchronize()
    return time.perf_counter() - start, mx.get_peak_memory(), loss


def main() -> None:
    """Time every contender in turn and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--labelled", type=float, default=1.0, help="share of the tokens")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=shapes.default_cache())
    parser.add_argument("--short-rows", type=int, help="compare packing, on rows of so many tokens")
    parser.add_argument("--budget", type=float, default=1000, help="of packing's contenders, in GB")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    folder = checkpoint(args.cache, args.shape, args.blocks)
    if args.short_rows:
        compare_packing(folder, args)
        return
    batch = floor.random_batch(shapes.SHAPES[args.shape][-1], args.tokens, args.labelled)
    print(f"{args.shape}, {args.blocks} blocks, {args.tokens} tokens, {args.labelled:.0%} labelled")
    pairs = [("plenty", False), ("its peak with checkpointing", True)]
    print("| against mlx-lm | budget MB | its peak | our peak | median ratio | lowest | highest |")
    print("|---|---|---|---|---|---|---|")
    for name, checkpointing in pairs:
        with ExitStack() as stack:
            other = theirs(folder, args.rank, batch, checkpointing)
            held = mx.get_active_memory()  # its weights stay while ours is measured
            _, peak, _ = timed(other)
            budget = peak if checkpointing else 10**12
            own, words = ours(folder, args.rank, batch, budget, stack)
            timed(own)
            before = mx.get_active_memory()
            own_held = before - held
            ratios = []
            for _ in range(args.steps):
                t, their_peak, their_loss = timed(other)
                o, own_peak, own_loss = timed(own)
                ratios.append(o / t)
            their_peak -= own_held
            own_peak -= held
            print(
                f"| {name} | {budget / 1e6:.0f} | {their_peak / 1e6:.0f} | {own_peak / 1e6:.0f} | "
                f"{np.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |",
                flush=True,
            )
            print(f"\n{words}; losses {their_loss:.4f} and {own_loss:.4f}\n", flush=True)
        del other, own
        gc.collect()


if __name__ == "__main__":
    main()
