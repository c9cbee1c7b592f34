"""Options that a full fine-tuning has no use for."""

import dataclasses
from typing import Any

from mlx_edgelora.config.nested import LoraParameters
from mlx_edgelora.errors import EdgeLoraError

LEAVE_OUT = "which trains the blocks' own weights; leave it out, or use fine_tune_type lora"


def check_full(config: Any) -> None:
    """Reject options of adapters, and quantization, in a full fine-tuning.

    Args:
        config: a `TrainConfig`.

    Raises:
        EdgeLoraError: such an option is set.
    """
    if config.fine_tune_type != "full":
        return
    for field in dataclasses.fields(LoraParameters):
        value = getattr(config.lora_parameters, field.name)
        if value != field.default:
            raise EdgeLoraError(
                f"lora_parameters.{field.name}: got {value!r} with fine_tune_type full, {LEAVE_OUT}"
            )
    for name in ("lora_preset", "loraplus_lr_ratio"):
        if (value := getattr(config, name)) is not None:
            raise EdgeLoraError(f"{name}: got {value!r} with fine_tune_type full, {LEAVE_OUT}")
    if config.quantize is not None:
        raise EdgeLoraError(
            f"quantize: got {config.quantize} with fine_tune_type full, which cannot train "
            "quantized weights; leave it out, or use fine_tune_type lora"
        )
