"""LoRA fine-tuning of language models on MLX in a fraction of the usual memory.

    from mlx_edgelora import TrainConfig, finetune
    result = finetune(TrainConfig(model="...", data="..."))

`value_and_grad` is the same for your own loop: a drop-in for `mlx.nn.value_and_grad`.
"""

from mlx_edgelora.config import LoraParameters, TrainConfig
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.memory.gradients import value_and_grad
from mlx_edgelora.memory.stores import MappedStore, RamStore
from mlx_edgelora.training.callbacks import TrainingCallback
from mlx_edgelora.training.finetune import finetune
from mlx_edgelora.training.loop import TrainResult

__all__ = [
    "EdgeLoraError",
    "LoraParameters",
    "MappedStore",
    "RamStore",
    "TrainConfig",
    "TrainResult",
    "TrainingCallback",
    "finetune",
    "value_and_grad",
]
