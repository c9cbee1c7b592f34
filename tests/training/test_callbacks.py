from types import SimpleNamespace

import pytest
from mlx_lm.tuner import callbacks as mlx_lm_callbacks

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.training import callbacks
from mlx_edgelora.training.callbacks import TrainingCallback, reporting_callbacks


class Service:
    def __init__(self, project_name, log_dir, config):
        self.arguments = (project_name, log_dir, config)


def test_hooks_are_those_of_mlx_lm():
    assert TrainingCallback is mlx_lm_callbacks.TrainingCallback


@pytest.mark.parametrize("report_to", [None, ""])
def test_no_service(make_config, report_to):
    assert reporting_callbacks(make_config(report_to=report_to)) == []


def test_every_named_service_is_started(make_config, monkeypatch):
    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", Service)
    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "swanlab", Service)
    config = make_config(report_to="wandb, SwanLab", project_name="p")
    services = reporting_callbacks(config)
    assert [service.arguments for service in services] == [
        ("p", config.adapter_path, config.to_dict())
    ] * 2


def test_a_service_that_is_not_installed(make_config, monkeypatch):
    monkeypatch.setattr(mlx_lm_callbacks, "wandb", None)
    with pytest.raises(EdgeLoraError, match="wandb is not installed; run `pip install wandb`"):
        reporting_callbacks(make_config(report_to="wandb"))


def test_an_unknown_service():
    with pytest.raises(EdgeLoraError, match="report_to: got 'board', expected one of wandb, swan"):
        reporting_callbacks(SimpleNamespace(report_to="board"))
