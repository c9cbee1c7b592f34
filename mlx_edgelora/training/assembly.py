"""An engine put together from an adapted model and a plan."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.memory.blockwise import BlockWalk
from mlx_edgelora.memory.meter import DiskMeter
from mlx_edgelora.memory.plan import Plan
from mlx_edgelora.memory.stores import MappedStore, RamStore
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import attach
from mlx_edgelora.model.lora import set_kernel
from mlx_edgelora.model.mlp import slice_mlps
from mlx_edgelora.training.paged import PagedTrained
from mlx_edgelora.training.step import Engine, Loss
from mlx_edgelora.training.trained import ResidentTrained, Trained


@dataclass(frozen=True)
class Settings:
    """What an engine is made of, beside a model and a plan.

    Attributes:
        folder: of scratch files; used if the plan writes any.
        dtype: of frozen floating weights and activations; the checkpoint's own if None.
        loss: to train with; the exact one by default.
        load: called with what is trained before the weights are attached.
        rest: called after every block.
    """

    folder: str | os.PathLike
    dtype: str | None = None
    loss: Loss | None = None
    load: Callable[[Trained], None] = lambda trained: None
    rest: Callable[[], None] = lambda: None


@contextmanager
def assembled(
    lazy: LazyModel,
    plan: Plan,
    settings: Settings,
    notify: Callable[[str], None] = lambda line: None,
) -> Iterator[Engine]:
    """The engine of an adapted model in training mode; its files are gone on exit.

    Args:
        lazy: its model went through `add_lora`.
        plan: is obeyed until the engine is given another one.
        settings: the rest.
        notify: gets a line for every choice that was made on the way.

    Raises:
        EdgeLoraError: the architecture cannot be walked, a file cannot be read or made.
    """
    meter, model = DiskMeter(), lazy.model
    kernel = set_kernel(model, plan.kernel)
    with ExitStack() as stack:
        if plan.adapters == "paged":
            trained: Trained = PagedTrained(model, settings.folder, meter)
        else:
            trained = ResidentTrained(model)
        stack.enter_context(closing(trained))
        settings.load(trained)
        attached = attach(
            lazy,
            streamed=plan.streams,
            dtype=settings.dtype,
            meter=meter,
            streamed_blocks=plan.streamed_blocks,
            head_streamed=plan.head == "streamed",
        )
        lazy.raw.clear()  # it would keep what was cast
        store = MappedStore(settings.folder, meter) if plan.spills else RamStore()
        stack.enter_context(closing(store))
        compiled = mx.default_device() == mx.gpu
        walk = BlockWalk(
            model,
            store,
            attached.weights,
            compiled,
            trained,
            plan=plan,
            rest=settings.rest,
            blocks=attached.blocks,
        )
        model.train()
        sliced = slice_mlps(walk.blocks)
        loss = settings.loss or CrossEntropy(plan.loss_bytes)
        engine = Engine(model, walk, attached.head, meter, loss, trained)
        engine.obey(plan)
        notify(f"quantized products: {kernel}; {sliced}")
        notify(f"loss over {attached.logits}; last block for {walk.last_block}")
        if plan.tile_tokens is not None:
            notify(f"tiles: {walk.tiling}")
        yield engine
