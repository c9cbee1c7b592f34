"""Hooks into a run: mlx-lm's own class and its reporters, so that code written for it works."""

from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK, TrainingCallback

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError

__all__ = ["TrainingCallback", "reporting_callbacks"]


def reporting_callbacks(config: TrainConfig) -> list[TrainingCallback]:
    """The callbacks that `report_to` (`wandb`, `swanlab` or both with a comma) names.

    Raises:
        EdgeLoraError: an unknown service, or one whose package is not installed.
    """
    names = [name.strip().lower() for name in (config.report_to or "").split(",")]
    return [_reporter(name, config) for name in names if name]


def _reporter(name: str, config: TrainConfig) -> TrainingCallback:
    if name not in SUPPORT_CALLBACK:
        raise EdgeLoraError(
            f"report_to: got {name!r}, expected one of {', '.join(SUPPORT_CALLBACK)}"
        )
    try:
        return SUPPORT_CALLBACK[name](
            project_name=config.project_name,
            log_dir=config.adapter_path,
            config=config.to_dict(),
        )
    except ImportError as error:
        raise EdgeLoraError(
            f"report_to: {name} is not installed; run `pip install {name}` or leave report_to out"
        ) from error
