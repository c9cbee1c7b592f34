"""Time of a step against mlx-lm's own, at budgets from its peak with checkpointing to plenty.

    python benchmarks/speed.py --shape llama-3.2-1b --blocks 4 --tokens 256
    python benchmarks/speed.py --shape llama-3.2-1b --blocks 4 --tokens 256 --labelled 0.3

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
from mlx_edgelora.data import Batch
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
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    folder = checkpoint(args.cache, args.shape, args.blocks)
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
