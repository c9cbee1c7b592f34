"""The options of a run: names, defaults, help texts and checks."""

from mlx_edgelora.config.command_line import build_parser, config_from_cli
from mlx_edgelora.config.nested import OPTIMIZERS, HubDataset, LoraParameters
from mlx_edgelora.config.train_config import TrainConfig

__all__ = [
    "OPTIMIZERS",
    "HubDataset",
    "LoraParameters",
    "TrainConfig",
    "build_parser",
    "config_from_cli",
]
