"""Memory of the system while a run goes on: MLX's limits, its cache, the file, the pressure."""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from tiny import run_options, words, write_rows

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage import page_file
from mlx_edgelora.training import limits
from mlx_edgelora.training import opening as module
from mlx_edgelora.training.callbacks import TrainingCallback
from mlx_edgelora.training.finetune import finetune

LARGE = 1 << 40


@pytest.fixture
def options(tiny, tmp_path):
    def make(**changes):
        common = run_options(tiny, tmp_path) | {"steps_per_report": 1}
        return TrainConfig.from_dict(common | changes)

    return make


@pytest.fixture
def unlimited():
    """MLX with limits as high as they are on Metal."""
    before = mx.set_memory_limit(LARGE), mx.set_cache_limit(LARGE)
    mx.clear_cache()
    yield
    mx.set_memory_limit(before[0])
    mx.set_cache_limit(before[1])
    mx.clear_cache()


def found(change):
    value = change(LARGE)
    change(value)
    return value


class Seen(TrainingCallback):
    """MLX's limits and its cache, at every report."""

    def __init__(self):
        self.memory, self.limit, self.cache = 0, 0, []

    def on_train_loss_report(self, train_info):
        self.memory, self.limit = found(mx.set_memory_limit), found(mx.set_cache_limit)
        self.cache.append(mx.get_cache_memory())


@pytest.fixture
def plans(monkeypatch):
    """The plans of the runs, when their limits were set last."""
    kept, original = [], limits.limits

    def spied(chosen):
        kept.append(chosen)
        return original(chosen)

    monkeypatch.setattr(module, "limits", spied)
    return kept


def run(config, notify=lambda line: None):
    seen = Seen()
    finetune(config, [seen], notify)
    return seen


@pytest.mark.parametrize("fails", [False, True])
def test_limits_are_set_and_put_back(options, unlimited, plans, fails):
    config = options(memory_budget="900MB", learning_rate=1e38 if fails else 1e-5)
    if fails:
        with pytest.raises(EdgeLoraError, match="expected finite numbers"):
            run(config)
    else:
        seen = run(config)
        assert seen.memory == 855 * 10**6
        assert seen.limit == 900 * 10**6 - plans[-1].choice.peak > Plan.cache_bytes
    assert found(mx.set_memory_limit) == found(mx.set_cache_limit) == LARGE


def test_the_least_memory_has_a_limit_too(options, unlimited, plans):
    seen = run(options(memory_budget="min"))
    chosen = plans[-1]
    assert seen.memory == chosen.choice.needs < 100 * 10**6
    assert seen.limit == chosen.plan.cache_bytes < Plan.cache_bytes


def test_limits_that_are_lower_already_stay(options, unlimited):
    mx.set_memory_limit(800 * 10**6)
    mx.set_cache_limit(10**6)
    seen = run(options(memory_budget="900MB"))
    assert (seen.memory, seen.limit) == (800 * 10**6, 10**6)
    assert found(mx.set_memory_limit) == 800 * 10**6
    assert found(mx.set_cache_limit) == 10**6


# Reads a file that was cut, beside other operations, until MLX has lost count of its tasks; then
# trains.
AFTER_AN_ERROR = """
import json, sys
import mlx.core as mx
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.measure import meter
from mlx_edgelora.training.finetune import finetune

options, cut = json.loads(sys.argv[1]), sys.argv[2]
mx.set_default_device(mx.cpu)
assert meter.can_limit_memory() and meter.can_limit_memory()
meter._PATIENCE = 0.5
for length in range(300, 2000):
    mx.save_safetensors(cut, {"x": mx.zeros((1000,))})
    x = mx.load(cut)["x"]
    open(cut, "wb").close()
    for _ in range(length):
        x = x[:1] + 1
    try:
        mx.eval(x)
    except RuntimeError:
        pass
    if not meter.can_limit_memory():
        finetune(TrainConfig.from_dict(options), [], print)
        break
else:
    print("MLX counts its tasks whatever fails")
"""


def test_a_run_after_a_task_of_mlx_failed_ends(tiny, tmp_path):
    """MLX would wait for good at its memory limit."""
    options = json.dumps(run_options(tiny, tmp_path) | {"memory_budget": "min"}, default=str)
    command = [sys.executable, "-c", AFTER_AN_ERROR, options, str(tmp_path / "cut.safetensors")]
    lines = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120
    ).stdout.splitlines()
    if lines == ["MLX counts its tasks whatever fails"]:
        pytest.skip(lines[0])
    assert any("lost count of its tasks" in line for line in lines), lines
    assert (tmp_path / "adapters" / "adapters.safetensors").is_file()


@pytest.mark.parametrize("budget", ["min", "900MB", None])
def test_no_memory_is_wired(options, monkeypatch, budget):
    """As on a Mac, where each commit of a buffer would cost."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: pytest.fail("nothing is to be wired"))
    run(options(memory_budget=budget, kernel="dequantize"))


@pytest.mark.parametrize(
    ("changes", "empties"),
    [
        ({"memory_budget": "900MB"}, False),
        ({"memory_budget": "min"}, True),
        ({"memory_budget": "900MB", "clear_cache_threshold": 0}, True),
        ({"memory_budget": "min", "clear_cache_threshold": "1GB"}, False),
    ],
    ids=["room", "tight", "asked to", "asked not to"],
)
def test_the_cache_is_emptied_where_memory_is_tight(options, unlimited, changes, empties):
    seen = run(options(**changes, iters=3))
    # Reading the learning rate leaves a few bytes in the cache after it was cleared.
    assert all((size < 1 << 14) is empties for size in seen.cache)
    assert max(seen.cache) <= seen.limit


def test_a_plan_that_was_given_says_what_the_cache_is(options, unlimited, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(Plan(cache_bytes=3 * 10**6).json())
    seen = run(options(plan=str(file)))
    assert seen.limit == 3 * 10**6
    assert max(seen.cache) > 1 << 14


@pytest.mark.slow
@pytest.mark.parametrize("plan", [{}, {"tile_tokens": 32}], ids=["whole", "tiles"])
def test_the_file_is_mapped_once_whatever_the_lengths(options, tmp_path, monkeypatch, plan):
    data, mapped, original = tmp_path / "rising", [], page_file.np.memmap

    def memmap(*args, **named):
        mapped.append(named["shape"])
        return original(*args, **named)

    data.mkdir()
    rng = np.random.default_rng(0)
    lengths = [30, 90, 200, 400]
    write_rows(data / "train.jsonl", [{"text": words(rng.integers(0, 100, n))} for n in lengths])
    given = tmp_path / "plan.json"
    given.write_text(Plan(inputs="file", **plan).json())
    monkeypatch.setattr(page_file.np, "memmap", memmap)
    finetune(
        options(data=str(data), batch_size=1, iters=8, max_seq_length=1024, plan=str(given)),
        notify=lambda line: None,
    )
    assert len(mapped) == 1


def test_a_volume_without_room_is_told_before_the_first_step(options, tmp_path, monkeypatch):
    def full(descriptor, size):
        raise OSError(28, "No space left on device")

    given = tmp_path / "plan.json"
    given.write_text(Plan(inputs="file").json())
    monkeypatch.setattr(page_file, "_preallocate", full)
    with pytest.raises(EdgeLoraError, match=r"spilling activations needs .* [MG]B are free"):
        finetune(options(plan=str(given), verify="off"), notify=lambda line: None)
    assert not (tmp_path / "adapters").exists()


def test_pressure_is_told_once(options, monkeypatch):
    levels, lines = iter([None, "warning", "critical", None]), []
    monkeypatch.setattr(limits, "memory_pressure", lambda: next(levels))
    finetune(options(iters=4), notify=lines.append)
    warnings = [line for line in lines if "short of memory" in line]
    assert warnings == [
        "warning: macOS is short of memory (pressure: warning), so this run and other programs "
        "slow down; close some of them, or start again with a smaller --memory-budget"
    ]
    assert list(levels) == ["critical", None]  # not asked for any more


@pytest.mark.parametrize(("free", "expected"), [(10**9, True), (None, None)])
def test_the_engine_knows_what_is_left_for_files(options, monkeypatch, plans, free, expected):
    settings, original = [], module.Settings

    def spied(*args, **named):
        settings.append(named["file_cache"])
        return original(*args, **named)

    monkeypatch.setattr(module, "Settings", spied)
    monkeypatch.setattr(module, "free_memory", lambda: free)
    run(options(memory_budget="900MB"))
    assert settings == [expected and free - plans[-1].choice.peak]
