"""What would fool a benchmark is caught, and who is honest passes."""

import subprocess
import sys

import pytest

from mlx_edgelora.benchmark.contenders import Contender
from mlx_edgelora.benchmark.report import ContextResults, ratio, row
from mlx_edgelora.benchmark.results import TOLERANCES, Result
from mlx_edgelora.benchmark.rounds import Comparison

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PLAIN = """
import sys
from pathlib import Path
import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load
from types import SimpleNamespace

model_path, data, start, rank, batch, limit, steps, checkpointing, out = sys.argv[1:]
model, tokenizer = load(model_path)
model.freeze()
linear_to_lora_layers(
    model, len(model.layers), {"rank": int(rank), "scale": 20.0, "dropout": 0.0}
)
model.load_weights(start, strict=False)
rows = load_local_dataset(Path(data), tokenizer, SimpleNamespace(mask_prompt=True))[0]
np.random.seed(0)
args = TrainingArgs(
    batch_size=int(batch), iters=int(steps), max_seq_length=int(limit), adapter_file=out,
    grad_checkpoint=checkpointing == "yes",
)
train(model, optimizers.AdamW(1e-4), CacheDataset(rows), args=args)
print("peak", mx.get_peak_memory())
"""


@pytest.mark.parametrize(
    "name",
    [
        "mlx-lm",
        "mlx-lm, checkpointing",
        "cheats:honest",
        "mlx-edgelora, no limit",
        "mlx-edgelora, min",
    ],
)
def test_the_honest_are_believed(compared, name):
    result = compared[name]
    assert (result.faults, result.absent) == ([], None)
    assert len(result.steps) == 3 and all(step.seconds > 0 for step in result.steps)
    assert 0 < result.peak < result.footprint and 0 < result.bare < result.footprint
    if name != "mlx-lm":
        assert len(result.ratios) == 2 and result.adapter_gap < 1e-3


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("cheats:trains_nothing", "its adapters are not mlx-lm's: their distance is 1.000"),
        ("cheats:skips_the_optimizer", "its adapters are not mlx-lm's: their distance is 1.000"),
        ("cheats:trains_nothing", "its loss drifts from mlx-lm's"),
        ("cheats:skips_the_optimizer", "its loss drifts from mlx-lm's"),
        ("cheats:reports_a_promise", "it left work unevaluated when it reported step 1"),
        ("cheats:updates_later", "it left work unevaluated when it reported step 1"),
        ("stale:run", "its process was not fresh: MLX held"),
    ],
)
def test_the_fooled_benchmark(compared, name, fault):
    result = compared[name]
    assert any(found.startswith(fault) for found in result.faults), result.faults
    context = ContextResults(64, 128, 0.5, None, list(compared.values()))
    assert ratio(result) == "INVALID" and "INVALID" in row(result, context)


def test_resetting_the_counter_hides_nothing(compared):
    assert compared["cheats:honest"].peak > 0.8 * compared["mlx-lm"].peak


def test_what_is_left_to_the_harness_is_in_the_time(compared):
    assert compared["cheats:updates_later"].seconds > compared["cheats:honest"].seconds


def test_who_fails_is_not_measured(compared):
    assert compared["cheats:vanishes"].absent.startswith("it ended with status 3")
    assert not compared["cheats:vanishes"].faults


def test_disk_traffic_is_told(compared):
    assert compared["mlx-edgelora, min"].moved("read") > 0
    assert compared["mlx-edgelora, min"].moved("written") > 0
    assert compared["mlx-edgelora, no limit"].moved("read") == 0


@pytest.mark.parametrize("name", ["mlx-lm", "mlx-lm, checkpointing"])
def test_mlx_lm_by_hand_has_the_same_peak(compared, job, tmp_path, name):
    sizes = map(str, (job.rank, job.batch, job.limit, job.steps))
    checkpointing = "yes" if "checkpointing" in name else "no"
    call = [sys.executable, "-c", PLAIN, job.model, job.data, job.start, *sizes, checkpointing]
    call.append(str(tmp_path / "adapters.safetensors"))
    out = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    peak = int(out.splitlines()[-1].removeprefix("peak "))
    assert abs(compared[name].peak / peak - 1) < 0.03


class _Process:
    """What a comparison knows of one that runs."""

    def __init__(self, peak_bytes, waiting, bare=10):
        self.peak_bytes, self.waiting, self.result = peak_bytes, waiting, Result("one", bare=bare)


def test_as_many_wait_as_there_is_room_for(job, tmp_path):
    comparison = Comparison(job, tmp_path, TOLERANCES["float32"], print)
    comparison._free, comparison._reference = 300, _Process(peak_bytes=100, waiting=40)
    other, plenty, half, least = (
        Contender(name, "", budget=budget, share=share)
        for name, budget, share in (
            ("other", None, None),
            ("plenty", 2**50, None),
            ("half", None, 0.5),
            ("min", "min", None),
        )
    )
    assert comparison._room([]) == 300 - 40 - 60
    assert comparison._room([_Process(peak_bytes=150, waiting=30)]) == 300 - 70 - 120
    asked = [
        (rival, comparison._ours(rival, 80) if rival.is_ours else job)
        for rival in (other, plenty, half, least)
    ]
    assert [comparison._need(*pair) for pair in asked] == [100, 100, 54, 35]
    group = [_Process(peak_bytes=100, waiting=40), _Process(peak_bytes=100, waiting=40)]
    room = [comparison._has_room(*pair, group) for pair in asked]
    assert comparison._room(group) == 120 and room == [True] * 4
    group.append(_Process(peak_bytes=100, waiting=40))
    assert [comparison._has_room(*pair, group) for pair in asked] == [False, False, True, True]


def test_who_has_no_room_is_told(job, tmp_path):
    comparison = Comparison(job, tmp_path, TOLERANCES["float32"], print)
    comparison._free, comparison._reference = 10**9, _Process(10**9, 10**8)
    (result,) = comparison._groups([(Contender("other", ""), job)])
    assert result.absent == "needs about 1.00 GB beside mlx-lm's process, and 0 B are free"
