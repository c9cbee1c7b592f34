"""Add LoRA or DoRA layers to an mlx-lm model: mlx-lm's layers with this package's forward.

mlx-lm chooses the layers and draws the initial matrices, so names, shapes and random numbers are
those of mlx-lm; then the classes of the layers are replaced by subclasses that multiply
differently. No attribute changes, so mlx-lm can load, fuse and generate with the result.
"""

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear as MlxDoRALinear
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear
from mlx_lm.tuner.lora import LoRASwitchLinear as MlxLoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.lora_layers import DoRALinear, LoRALinear, LoRASwitchLinear
from mlx_edgelora.blocks.refusals import Refusal, refusal_error
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers.linear import DequantizedEmbedding, DequantizedLinear, resolve_kernel
from mlx_edgelora.layers.multi_linear import (
    DequantizedMultiLinear,
    HeadsMultiLinear,
    UnpackedMultiLinear,
)
from mlx_edgelora.model.checkpoint import error_text
from mlx_edgelora.model.dora import check_dora

MATRICES = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
LORA_CLASSES = {
    MlxLoRALinear: LoRALinear,
    MlxLoRASwitchLinear: LoRASwitchLinear,
    MlxDoRALinear: DoRALinear,
}
DEQUANTIZED_CLASSES = {
    nn.QuantizedLinear: DequantizedLinear,
    nn.QuantizedEmbedding: DequantizedEmbedding,
    QuantizedMultiLinear: DequantizedMultiLinear,
    MultiLinear: UnpackedMultiLinear,
}
FUSED_CLASSES = {QuantizedMultiLinear: HeadsMultiLinear, MultiLinear: UnpackedMultiLinear}


def add_lora(
    model: nn.Module,
    num_layers: int,
    rank: int = 8,
    scale: float = 20.0,
    dropout: float = 0.0,
    keys: Sequence[str] | None = None,
    dora: bool = False,
) -> None:
    """Freeze the model and give its last blocks LoRA layers, as `mlx_lm.lora` does.

    Args:
        model: an mlx-lm model; changed in place.
        num_layers: number of last blocks; -1 for all.
        rank, scale, dropout: settings of every adapter; `lora_a` [in, rank] is uniform, `lora_b`
            [rank, out] zero, both float32.
        keys: names of layers inside a block, or full names outside them; None for every
            linear layer of a block.
        dora: add DoRA layers, which have `m` [out], too: the norms of the rows, float32.

    Raises:
        EdgeLoraError: too many blocks, a key that names no layer, a layer that DoRA cannot adapt,
            or an architecture that mlx-lm's LoRA layers cannot be added to.
    """
    count = check_num_layers(model, num_layers)
    settings = {"rank": rank, "scale": scale, "dropout": dropout}
    if keys is not None:
        _check_keys(model, keys)
        settings["keys"] = list(keys)
    if dora:
        check_dora(model, count, keys)
    freeze(model)
    try:
        linear_to_lora_layers(model, count, settings, use_dora=dora)
    except ValueError as error:
        raise EdgeLoraError(
            f"lora_parameters.keys: {error}; name linear layers, each of them once"
        ) from error
    except MODEL_ERRORS as error:
        raise refusal_error(model, Refusal.LORA, error=str(error)) from error
    if not tree_flatten(model.trainable_parameters()):
        raise EdgeLoraError(
            "lora_parameters.keys: no layer was adapted, expected at least one; name layers that "
            "the last num_layers blocks have"
        )
    _replace_classes(model, LORA_CLASSES)


def check_num_layers(model: nn.Module, num_layers: int) -> int:
    """The number of last blocks to train, with -1 for all of them replaced.

    Raises:
        EdgeLoraError: the model has fewer.
    """
    count = len(model.layers) if num_layers == -1 else num_layers
    if count > len(model.layers):
        raise EdgeLoraError(
            f"num_layers: got {num_layers}, but the model has {len(model.layers)} blocks; "
            "lower it, or use -1 for all"
        )
    return count


def preset_keys(model: nn.Module, preset: str) -> tuple[str, ...] | None:
    """The layers of a preset, as `keys` of `add_lora`; they are found by what modules are.

    A module below a block that is called with a cache mixes tokens: attention and recurrent
    layers. All other layers of a block work token by token: MLPs, experts and their routers.

    Args:
        model: an mlx-lm model, adapted or not.
        preset: "attention", "mlp" or "all".

    Returns:
        Names of layers inside a block; None for all layers, as mlx-lm chooses them.

    Raises:
        EdgeLoraError: the blocks have no layer of this kind.
    """
    if preset == "all":
        return None
    found: dict[str, None] = {}
    for block in model.layers:
        modules = block.named_modules()
        mixers = [f"{path}." for path, module in modules if path and _mixes_tokens(module)]
        for path, module in modules:
            mixes = any(f"{path}.".startswith(mixer) for mixer in mixers)
            if _is_adaptable(module) and mixes == (preset == "attention"):
                found[path] = None
    # The layer inside of a LoRA layer is not another one.
    names = [name for name in found if name.rpartition(".")[0] not in found]
    if not names:
        raise EdgeLoraError(
            f"lora_preset: got {preset!r}, but no layer of this model's blocks is of this kind; "
            "name layers in lora_parameters.keys"
        )
    return tuple(sorted(names))


def _mixes_tokens(module: nn.Module) -> bool:
    return "cache" in inspect.signature(type(module).__call__).parameters


def _is_adaptable(module: nn.Module) -> bool:
    """Whether mlx-lm adapts a layer by default, or did."""
    kinds = (*MATRICES, nn.Embedding, nn.QuantizedEmbedding, *LORA_CLASSES)
    return hasattr(module, "to_lora") or isinstance(module, kinds)


def freeze(model: nn.Module) -> None:
    """Freeze all parameters of a model.

    Raises:
        EdgeLoraError: the architecture cannot be frozen.
    """
    try:
        model.freeze()
    except MODEL_ERRORS as error:
        raise refusal_error(model, Refusal.LORA, error=str(error)) from error


def can_switch_off(fine_tune_type: str) -> bool:
    """Whether `without_adapter` works for what a run of this type has trained."""
    return fine_tune_type == "lora"


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch the LoRA layers of a model off; they are switched on again on exit.

    Raises:
        EdgeLoraError: the model has no LoRA layers, or layers of DoRA.
    """
    layers = [m for m in model.modules() if "lora_b" in m and hasattr(m, "scale")]
    if not layers:
        raise EdgeLoraError(
            "adapter_path: holds no LoRA layers, so that it cannot be switched off; ask the "
            "base model by a run of its own"
        )
    if any("m" in layer for layer in layers):
        raise EdgeLoraError(
            "adapter_path: a DoRA adapter cannot be switched off; ask the base model by a run "
            "of its own"
        )
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


@contextmanager
def explain_misfit(adapter: Path, source: Path) -> Iterator[None]:
    """Turn mlx-lm's errors about an adapter that does not fit a model into an `EdgeLoraError`.

    Args:
        adapter: the adapter's folder.
        source: the model's folder.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise EdgeLoraError(
            f"{adapter}: does not fit the model in {source} ({error_text(error)}); name the model "
            "that it was trained on"
        ) from error


def set_kernel(model: nn.Module, kernel: str) -> str:
    """Choose the kernel for products with frozen quantized matrices.

    Args:
        model: changed in place.
        kernel: "fused" (MLX's `quantized_matmul`), "dequantize" (tile by tile), or "auto".

    Returns:
        The kernel chosen and the reason.
    """
    kernel, reason = resolve_kernel(kernel)
    _replace_classes(model, DEQUANTIZED_CLASSES if kernel == "dequantize" else FUSED_CLASSES)
    return f"{kernel} ({reason})"


def replace_dora(model: nn.Module) -> None:
    """Let the DoRA layers of an adapter of mlx-lm's never unpack a matrix whole."""
    _replace_classes(model, {MlxDoRALinear: DoRALinear})


def _replace_classes(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        if type(module) in classes:
            object.__setattr__(module, "__class__", classes[type(module)])


def _check_keys(model: nn.Module, keys: Sequence[str]) -> None:
    names = {name for block in model.layers for name, _ in block.named_modules()}
    names |= {name for name, _ in model.named_modules()}
    for key in keys:
        if key not in names:
            close = difflib.get_close_matches(key, sorted(names), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise EdgeLoraError(
                f"lora_parameters.keys: {key!r} names no layer of this model{hint or ';'} "
                "use names such as 'self_attn.q_proj'"
            )
