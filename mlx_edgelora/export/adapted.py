"""An adapter on its model, with no weight read: what every export starts from."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import explain_misfit
from mlx_edgelora.storage.safetensors import read_header
from mlx_edgelora.training.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_adapter,
    model_for,
    read_adapter_config,
)
from mlx_edgelora.training.text import abbreviate

LAYERS = LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear, DoRAEmbedding
_LEAVES = "lora_a", "lora_b", "m"


@dataclass
class AdaptedModel:
    """A model with an adapter, none of whose weights are in memory.

    Attributes:
        lazy: the model, with mlx-lm's LoRA or DoRA layers.
        name: the model's folder or Hub name.
        adapter: the adapter's folder.
        config: content of its `adapter_config.json`.
        layers: the adapted layers by their name in the model.
    """

    lazy: LazyModel
    name: str
    adapter: Path
    config: dict[str, Any]
    layers: dict[str, nn.Module]

    @property
    def model_type(self) -> str:
        """The model's architecture, as its `config.json` names it."""
        return self.lazy.config["model_type"]


def open_adapted(
    adapter: str | os.PathLike, model: str | None, notify: Callable[[str], None]
) -> AdaptedModel:
    """Open an adapter on its model and check that they belong together.

    Args:
        adapter: the adapter's folder.
        model: a folder or a Hub name; None for the model that the adapter names.
        notify: called with notes.

    Raises:
        EdgeLoraError: a file is missing or damaged, the adapter is not of LoRA or DoRA layers, or
            its tensors are not those of the model's adapted layers.
    """
    folder = Path(adapter)
    config = read_adapter_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise EdgeLoraError(
            f"{folder / CONFIG_FILE}: fine_tune_type is {kind!r}, expected lora or dora; merge "
            "other kinds with mlx-edgelora fuse"
        )
    if note := check_adapter(folder / WEIGHTS_FILE):
        notify(f"note: {note}")
    name = model_for(folder, model, notify)
    lazy = open_model(name, streamed=False, quantize=None, cache=Path())
    with explain_misfit(folder, lazy.source):
        load_adapters(lazy.model, str(folder))
    layers = {name: part for name, part in lazy.model.named_modules() if isinstance(part, LAYERS)}
    expected = {
        f"{place}.{leaf}" for place, layer in layers.items() for leaf in _LEAVES if leaf in layer
    }
    if missing := sorted(expected - set(read_header(folder / WEIGHTS_FILE))):
        raise EdgeLoraError(
            f"{folder / WEIGHTS_FILE}: lacks {abbreviate(missing)}, which {CONFIG_FILE} asks for; "
            "put back the files that belong together"
        )
    return AdaptedModel(lazy, name, folder, config, layers)
