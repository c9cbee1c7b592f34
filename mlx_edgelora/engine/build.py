"""Build an engine from an adapted model and a plan."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from mlx_edgelora.blocks.experts import group_experts
from mlx_edgelora.blocks.gated_mlp import slice_mlps
from mlx_edgelora.engine.adapter_state import AdapterState, ResidentAdapterState
from mlx_edgelora.engine.functions import can_compile
from mlx_edgelora.engine.paged_adapters import PagedAdapterState
from mlx_edgelora.engine.step import Engine, Loss
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.layers.fused import set_attention_block
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.measure.meter import DiskMeter, can_limit_memory
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import attach
from mlx_edgelora.model.lora import set_kernel
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage.stores import MappedStore


@dataclass(frozen=True)
class Settings:
    """Settings of an engine that are in neither the model nor the plan.

    Attributes:
        folder: folder of scratch files, used if the plan writes any.
        dtype: dtype of frozen floating weights and of activations; None for the checkpoint's.
        loss: training loss; the exact cross-entropy by default.
        load: called with the adapter state before the weights are attached.
        pause: called after every block.
        compiled: whether to compile where MLX can.
        file_cache: bytes of files that the system can cache; None if unknown.
    """

    folder: str | os.PathLike
    dtype: str | None = None
    loss: Loss | None = None
    load: Callable[[AdapterState], None] = lambda trained: None
    pause: Callable[[], None] = lambda: None
    compiled: bool = True
    file_cache: int | None = None


@contextmanager
def build_engine(
    lazy: LazyModel,
    plan: Plan,
    settings: Settings,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[Engine]:
    """Build the engine of an adapted model, in training mode; close its files on exit.

    Args:
        lazy: the model, after `add_lora`.
        plan: followed until `set_plan` is called.
        settings: see `Settings`.
        log: called with a line for every choice.

    Raises:
        EdgeLoraError: the architecture cannot be walked, or a file cannot be read or created.
    """
    can_limit_memory()  # what it finds is for `memory_limit`, which steps use
    meter, model = DiskMeter(), lazy.model
    kernel = set_kernel(model, plan.kernel)
    compiled = settings.compiled and can_compile()
    with ExitStack() as stack:
        stack.callback(set_attention_block, None)  # set by the engine's plans
        if not plan.streams:
            lazy.raw.clear()  # it would keep what is moved to a file
        if plan.adapters == "paged":
            adapters: AdapterState = PagedAdapterState(model, settings.folder, meter, compiled)
        else:
            adapters = ResidentAdapterState(model, compiled)
        stack.enter_context(closing(adapters))
        settings.load(adapters)
        attached = attach(
            lazy,
            streamed=plan.streams,
            dtype=settings.dtype,
            meter=meter,
            streamed_blocks=plan.streamed_blocks,
            head_streamed=plan.head == "streamed",
            file_cache=settings.file_cache,
        )
        stack.enter_context(closing(attached.weights))
        lazy.raw.clear()  # it would keep what was cast
        # A later plan may keep the inputs of blocks in a file even if this one does not.
        store = MappedStore(settings.folder, meter, at_once=plan.spills)
        stack.enter_context(closing(store))
        walk = Walk(
            model,
            store,
            attached.weights,
            compiled,
            adapters,
            plan=plan,
            pause=settings.pause,
            blocks=attached.blocks,
        )
        model.train()
        sliced = slice_mlps(walk.blocks, source=attached.weights)
        layers = group_experts(walk.blocks, attached.weights)
        loss = settings.loss or CrossEntropy(plan.loss_bytes)
        engine = Engine(model, walk, attached.head, meter, loss, adapters)
        engine.set_plan(plan)
        way = "layer by layer" if plan.mlp_bytes is None else f"in slices of {size(plan.mlp_bytes)}"
        log(f"quantized matrices: kernel {kernel}; MLPs {way} ({sliced})")
        if layers:
            groups = (
                "all at once" if plan.mlp_bytes is None else f"groups of {size(plan.mlp_bytes)}"
            )
            log(f"experts: {groups} ({layers} layers of experts)")
        which = "labelled tokens" if walk.computes_rows_only else "all tokens"
        log(f"loss over {attached.logits}; last block computed for {which}")
        if plan.tile_tokens is not None:
            log(f"tiles: {walk.tiling}")
        yield engine
