"""Hooks into a run: mlx-lm's own class and its reporters, so that code written for it works."""

import os
from collections.abc import Mapping
from typing import Any

from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK, TrainingCallback

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError

__all__ = ["TensorBoardCallback", "TrainingCallback", "reporting_callbacks"]


class TensorBoardCallback(TrainingCallback):
    """Writes every figure of a report for TensorBoard, which mlx-lm has no reporter for.

    Args:
        project_name: the run's name in TensorBoard; None for none.
        log_dir: its folder `tensorboard` gets the event files.
        config: options of the run, shown as text.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, project_name: str | None, log_dir: str, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - an optional dependency

        folder = os.path.join(log_dir, "tensorboard", project_name or "")
        self._writer = SummaryWriter(folder, flush_secs=10)  # the rest when Python exits
        rows = [f"| {name} | {value} |" for name, value in config.items() if value is not None]
        self._writer.add_text("options", "\n".join(["| option | value |", "|---|---|", *rows]))

    def on_train_loss_report(self, train_info: dict) -> None:
        """Called at every report of a training loss."""
        for name, value in train_info.items():
            if name != "iteration":
                self._writer.add_scalar(name, value, train_info["iteration"])

    def on_val_loss_report(self, val_info: dict) -> None:
        """Called at every validation."""
        self.on_train_loss_report(
            {name: val_info[name] for name in ("iteration", "val_loss", "val_time")}
        )


# The package to install where it is not called like the service.
_PACKAGES = {"tensorboard": "tensorboardX"}


def reporting_callbacks(config: TrainConfig) -> list[TrainingCallback]:
    """The callbacks that `report_to` names: wandb, swanlab, tensorboard, or several with commas.

    Raises:
        EdgeLoraError: an unknown service, or one whose package is not installed.
    """
    names = [name.strip().lower() for name in (config.report_to or "").split(",")]
    return [_reporter(name, config) for name in names if name]


def _reporter(name: str, config: TrainConfig) -> TrainingCallback:
    services = SUPPORT_CALLBACK | {"tensorboard": TensorBoardCallback}
    if name not in services:
        raise EdgeLoraError(f"report_to: got {name!r}, expected one of {', '.join(services)}")
    try:
        return services[name](
            project_name=config.project_name,
            log_dir=config.adapter_path,
            config=config.to_dict(),
        )
    except ImportError as error:
        package = _PACKAGES.get(name, name)
        raise EdgeLoraError(
            f"report_to: {name} is not installed; run `pip install {package}` or leave report_to "
            "out"
        ) from error
