import io

import mlx.core as mx
import pytest

from mlx_edgelora.config import LoraParameters, TrainConfig
from mlx_edgelora.training.progress import Progress


def is_compiling():
    """Whether `mx.compile` does anything: a function is traced once then, not called twice."""
    calls = []
    function = mx.compile(lambda x: calls.append(x) or x)
    for _ in range(2):
        function(mx.zeros(1))
    return len(calls) == 1


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        small = {
            "adapter_path": str(tmp_path / "adapters"),
            "batch_size": 2,
            "iters": 4,
            "learning_rate": 1e-3,
            "lora_parameters": LoraParameters(rank=4, scale=8.0),
            "max_seq_length": 16,
            "num_layers": -1,
            "optimizer": "adamw",
            "steps_per_report": 1,
            "val_batches": -1,
        }
        return TrainConfig(**small | changes)

    return make


@pytest.fixture
def quiet():
    return Progress(0, lines=io.StringIO(), live=io.StringIO())
