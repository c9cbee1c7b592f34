import sys
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


def test_tensorboard_gets_every_figure(make_config, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    config = make_config(report_to="tensorboard", project_name="mine")
    (service,) = reporting_callbacks(config)
    service.on_train_loss_report({"iteration": 10, "train_loss": 2.5, "tokens_per_second": 99.0})
    service.on_val_loss_report(
        {"iteration": 20, "val_loss": 1.5, "val_time": 3.0, "tokens_per_second": 5.0}
    )
    service._writer.close()
    (file,) = (tmp_path / "adapters" / "tensorboard" / "mine").iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):  # length, its checksum, the event, its checksum
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found += [
            (event.step, v.tag, v.simple_value) for v in event.summary.value if "/" not in v.tag
        ]
        at += 16 + length
    assert [figure for figure in found if "options" not in figure[1]] == [
        (10, "train_loss", 2.5),
        (10, "tokens_per_second", 99.0),
        (20, "val_loss", 1.5),
        (20, "val_time", 3.0),
    ]


def test_tensorboard_without_its_package(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(EdgeLoraError, match="tensorboard is not installed; run `pip install tens"):
        reporting_callbacks(make_config(report_to="tensorboard"))
