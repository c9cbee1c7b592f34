"""Callbacks of a run: mlx-lm's class and reporters, so that code written for mlx-lm works."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK, TrainingCallback

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError

__all__ = ["StepCallback", "TensorBoardCallback", "TrainingCallback", "reporting_callbacks"]


class StepCallback(TrainingCallback):
    """A callback that is also called between steps, when no step is in progress."""

    def on_step(self, iteration: int, show: Callable[[str], None]) -> None:
        """Called before the first step and after every step.

        Args:
            iteration: number of finished steps.
            show: prints a line without disturbing the table and the bar.
        """
        raise NotImplementedError


class TensorBoardCallback(TrainingCallback):
    """Writes the figures of every report for TensorBoard; mlx-lm has no such reporter.

    Args:
        project_name: the run's name in TensorBoard, or None.
        log_dir: event files are written to its subfolder `tensorboard`.
        config: options of the run, shown as text.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, project_name: str | None, log_dir: str, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - an optional dependency

        folder = os.path.join(log_dir, "tensorboard", project_name or "")
        self._writer = SummaryWriter(folder, flush_secs=10)  # also written at exit
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


# Packages to install whose names differ from those of their services.
_PACKAGES = {"tensorboard": "tensorboardX"}


def reporting_callbacks(config: TrainConfig) -> list[TrainingCallback]:
    """The callbacks of the services in `report_to`: wandb, swanlab, tensorboard, comma-separated.

    Raises:
        EdgeLoraError: a service is unknown, or its package is not installed.
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
