"""Engines as a run has them, on tiny models, with everything to choose; and plain MLX beside."""

import functools
import weakref
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import build, config, quantizable
from backends import exact_reference
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config, save_model

from mlx_edgelora import data
from mlx_edgelora.engine import build as build_module
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.step import Engine, Loss
from mlx_edgelora.model.full import take_out, unfreeze_blocks
from mlx_edgelora.model.loading import DTYPES, open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.plan import Plan


class Batch(data.Batch):
    """A batch with any mask, not only what follows a prompt."""

    def __init__(self, tokens, mask):
        super().__init__(tokens, mask, indices=tuple(range(len(tokens))))


def random_batch(rows=2, tokens=17, vocabulary=101, share=0.4, seed=0) -> Batch:
    rng = np.random.RandomState(seed)
    labelled = rng.rand(rows, tokens) < share
    labelled[0, -1] = True
    return Batch(rng.randint(0, vocabulary, (rows, tokens + 1)).astype(np.int32), labelled)


def save(folder: Path, name: str, quantized: bool, **changes) -> Path:
    """Write a tiny random checkpoint in mlx-lm's format."""
    model = build(name, **changes)
    settings = config(name) | changes
    if quantized:
        nn.quantize(model, **quantizable())
        settings["quantization"] = {"bits": 4, "group_size": 32}
    save_model(folder, model)
    save_config(settings, folder / "config.json")
    return folder


def engine(
    folder: Path,
    *,
    streamed: bool = True,
    spilled: bool = True,
    dtype: str | None = None,
    compiled: bool = False,
    num_layers: int = -1,
    loss: Loss | None = None,
    full: bool = False,
    **options,
) -> Engine:
    """The engine that a run by some plan has, on a checkpoint, with random adapters.

    Args:
        folder: the checkpoint; scratch files are made there as well.
        streamed, spilled: False for a plan with all weights, or all inputs of blocks, in memory.
        compiled: as where MLX compiles. Unless the test has the fixture `compiles`, MLX builds
            each graph anew nevertheless.
        full: train the blocks' own weights in place of adapters.
        options: choices of the `Plan`, or of LoRA.
    """
    choices = {} if streamed else {"streamed_blocks": 0}
    choices |= {} if spilled else {"inputs": "memory"}
    names = {field.name for field in fields(Plan)}
    plan = Plan(**choices | {name: value for name, value in options.items() if name in names})
    lora = {name: value for name, value in options.items() if name not in names}
    lazy = open_model(str(folder), streamed=plan.streams, quantize=None, cache=folder / "cache")
    if full:
        unfreeze_blocks(lazy.model, num_layers)
        take_out(lazy, dtype and DTYPES[dtype])
    else:
        add_lora(lazy.model, num_layers, **({"rank": 4, "scale": 3.0} | lora))
        randomize(lazy.model)
    stack = ExitStack()
    with pytest.MonkeyPatch.context() as patch:
        if compiled:
            patch.setattr(build_module, "can_compile", lambda: True)
        made = stack.enter_context(
            build_engine(lazy, plan, Settings(folder, dtype, loss, compiled=compiled))
        )
    made.close = stack.close
    _opened.add(made)
    return made


# What a test that fails leaves open would make an unrelated one fail, by a ResourceWarning.
_opened: weakref.WeakSet = weakref.WeakSet()


def close_engines() -> None:
    """Close all engines that are still there."""
    while _opened:
        _opened.pop().close()


def randomize(model: nn.Module) -> None:
    """Random adapters, B included: with B = 0 every gradient of A is zero."""
    mx.random.seed(11)
    trained = tree_flatten(model.trainable_parameters())
    model.load_weights(
        [(name, 0.1 * mx.random.normal(value.shape)) for name, value in trained], strict=False
    )


def plain(folder: Path, num_layers: int = -1, dora: bool = False, **lora) -> nn.Module:
    """The same adapted model as mlx-lm builds it, all in memory."""
    model, _ = load_model(folder)
    model.freeze()
    count = len(model.layers) if num_layers == -1 else num_layers
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0} | lora
    linear_to_lora_layers(model, count, settings, use_dora=dora)
    exact_reference(model)
    randomize(model)
    return model.train()


def plain_full(folder: Path, num_layers: int = -1) -> nn.Module:
    """A model whose last blocks are trained, as mlx-lm unfreezes them."""
    model, _ = load_model(folder)
    model.freeze()
    for block in model.layers[-max(num_layers, 0) :]:
        block.unfreeze()
    return model.train()


def plain_value_and_grad(model: nn.Module, batch: Batch):
    """MLX's own autodiff of the masked mean cross-entropy."""
    inputs, targets = mx.array(batch.inputs()), mx.array(batch.labels())
    labelled = mx.array(batch.mask)

    def loss(model):
        logits = model(inputs).astype(mx.float32)
        return (nn.losses.cross_entropy(logits, targets) * labelled).sum() / labelled.sum()

    value, gradients = nn.value_and_grad(model, loss)(model)
    mx.eval(value, gradients)
    return value.item(), gradients


def resolution(model: nn.Module, batch: Batch, value_and_grad=None):
    """How finely float32 defines the gradients of `plain_value_and_grad(model, batch)`.

    Another function of model and batch may take its place (`value_and_grad`).

    Gives a function without arguments, which says of each array how far, as a norm, it moves when
    every float32 parameter is multiplied by 1 + 2**-23 or 1 - 2**-23, one unit in the last place,
    signs at random; the farthest of twelve draws. Plain MLX does not know it any better either.
    """

    value_and_grad = value_and_grad or plain_value_and_grad

    @functools.cache
    def moves() -> dict[str, float]:
        expected = dict(tree_flatten(value_and_grad(model, batch)[1]))
        draws = [nudged_gradients(model, batch, seed, value_and_grad) for seed in range(12)]
        return {name: max(norm(draw[name] - g) for draw in draws) for name, g in expected.items()}

    return moves


def nudged_gradients(
    model: nn.Module, batch: Batch, seed: int, value_and_grad=plain_value_and_grad
) -> dict[str, mx.array]:
    rng, kept = np.random.RandomState(seed), model.parameters()

    def nudge(value):
        if value.dtype != mx.float32:
            return value
        signs = rng.choice(np.float32([-1, 1]), value.shape)
        return value * mx.array(1 + signs * np.float32(2**-23))

    model.update(tree_map(nudge, kept))
    try:
        return dict(tree_flatten(value_and_grad(model, batch)[1]))
    finally:
        model.update(kept)


def norm(value: mx.array) -> float:
    return mx.linalg.norm(value.reshape(-1)).item()


def allowed(bound: float, difference: float, name: str, moves) -> float:
    """`bound`, or where that is exceeded what float32 leaves open, at most ten times as much.

    Args:
        moves: the function that `resolution` gives, asked only here; None for `bound` alone.
    """
    if difference <= bound or moves is None:
        return bound
    return max(bound, min(moves()[name], 10 * bound))


def assert_same_gradients(got, expected, tolerance=1e-5, resolution=None) -> None:
    """Every array within `tolerance` of its own norm, none missing, none dropped to zero.

    Which kernels a BLAS picks decides the rounding of every product, so machines differ. In some
    architectures (a recurrence, soft-capping, a gate) a small gradient is what remains of large
    terms, and rounding alone moves it by more than 1e-5: parameters changed by one unit in the last
    place move qwen3_next's by up to 1.2e-4, gemma2's by 6e-5, llama's by 4e-6. With what
    `resolution` gives for the reference, an array beyond `tolerance` may be as far away as that
    moves it, and never beyond ten times `tolerance`.
    """
    got, expected = dict(tree_flatten(got)), dict(tree_flatten(expected))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.abs(value).max().item() > 0, f"{name}: the reference gradient is zero"
        difference, size = norm(got[name] - value), norm(value)
        bound = allowed(tolerance * size, difference, name, resolution)
        assert difference <= bound, (
            f"{name}: {difference / size:.2e} of its norm, at most {bound / size:.1e}"
        )
