"""A run that was interrupted and resumed ends with the bits of one that never stopped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import make_data, make_model, run_options
from training_helpers import EndsAt, silent

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.training import resuming
from mlx_edgelora.training.checkpoints import find_checkpoint
from mlx_edgelora.training.resuming import saved_options
from mlx_edgelora.training.stopping import Stopped

ITERS = 11
SCHEDULE = {"name": "cosine_decay", "arguments": [1e-3, 6], "warmup": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model")
    make_data(root / "data", rows=10, splits=("train", "valid"))
    return root


@pytest.fixture
def options(tiny, tmp_path):
    """options(**changes) -> a run with accumulation, schedule and dropout, saved every 4 steps."""
    return partial(make_options, tiny, tmp_path)


def make_options(tiny, folder, **changes):
    return TrainConfig.from_dict(
        run_options(tiny, folder)
        | {
            "spill_dir": None,
            "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.2},
            "batch_size": 3,
            "iters": ITERS,
            "grad_accumulation_steps": 3,
            "lr_schedule": SCHEDULE,
            "optimizer": "adamw",
            "steps_per_report": 1,
            "save_every": 4,
            "verify": "off",
        }
        | changes
    )


def train(config):
    finetune(config, notify=silent)
    return mx.load(str(Path(config.adapter_path) / "adapters.safetensors"))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(np.array(found[name]), np.array(expected[name])), name


PLACES = {
    "resident": {"weights": "resident", "activations": "ram", "adapters": "resident"},
    "paged": {"weights": "streamed", "activations": "spill", "adapters": "paged"},
}


# Of an exception at a step, the step of the newest checkpoint: the last multiple of 4, unless
# parameters changed since (after steps 3, 6 and 9).
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("step", "saved"),
    [
        pytest.param(3, 3, marks=pytest.mark.slow),
        (5, 4),
        pytest.param(8, 8, marks=pytest.mark.slow),
        (10, 10),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(options, tmp_path, place, step, saved):
    options = partial(options, **PLACES[place])
    expected = train(options(adapter_path=str(tmp_path / "whole")))
    with pytest.raises(ZeroDivisionError):
        finetune(options(), [EndsAt(step)], silent)
    resumed = options(resume=True)
    checkpoint = find_checkpoint(Path(resumed.adapter_path))
    assert checkpoint.state.step == saved
    assert_same(train(resumed), expected)


@pytest.mark.parametrize(
    "optimizer",
    ["adafactor", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adam", "muon", "sgd"))],
)
def test_every_optimizer_resumes(options, tmp_path, optimizer):
    options = partial(options, optimizer=optimizer, lr_schedule=None, max_grad_norm=1.0)
    expected = train(options(adapter_path=str(tmp_path / "whole")))
    with pytest.raises(ZeroDivisionError):
        finetune(options(), [EndsAt(7)], silent)
    assert_same(train(options(resume=True)), expected)


def test_without_its_state_a_resumed_run_is_another(options, tmp_path, monkeypatch):
    """The comparison can fail: a new optimizer gives other bits."""
    expected = train(options(adapter_path=str(tmp_path / "whole")))
    with pytest.raises(ZeroDivisionError):
        finetune(options(), [EndsAt(8)], silent)
    monkeypatch.setattr(
        "mlx_edgelora.engine.adapter_state.ResidentAdapterState.restore", lambda *_: None
    )
    monkeypatch.setattr(
        "mlx_edgelora.engine.paged_adapters.PagedAdapterState.restore", lambda *_: None
    )
    with pytest.raises(AssertionError):
        assert_same(train(options(resume=True)), expected)


def test_resuming_moves_the_adapter_of_another_plan_as_well(options, tmp_path):
    """With other memory options the plan is another, and the result the same but for rounding."""
    expected = train(options(adapter_path=str(tmp_path / "whole")))
    with pytest.raises(ZeroDivisionError):
        finetune(options(**PLACES["resident"]), [EndsAt(8)], silent)
    found = train(options(resume=True, **PLACES["paged"]))
    for name in expected:
        assert np.allclose(np.array(found[name]), np.array(expected[name]), atol=1e-5), name


def test_the_plan_is_that_of_the_checkpoint(options):
    with pytest.raises(ZeroDivisionError):
        finetune(options(memory_budget="min"), [EndsAt(8)], silent)
    lines = []
    finetune(options(memory_budget="min", resume=True), notify=lines.append)
    plan = find_checkpoint(Path(options().adapter_path)).plan
    assert any(str(plan.parent.parent) in line for line in lines), lines


def test_a_used_folder_is_refused_and_kept(options):
    train(options())
    before = contents(Path(options().adapter_path))
    with pytest.raises(EdgeLoraError, match="holds the adapter of another run; use --resume"):
        train(options())
    assert contents(Path(options().adapter_path)) == before
    train(options(overwrite=True, iters=4, save_every=2))
    after = contents(Path(options().adapter_path))
    assert {name for name in after if name.endswith("_adapters.safetensors")} == {
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
    }


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5, "lr_schedule": None}, r"learning_rate \(was 1e-05, is 0\.5\)"),
        ({"batch_size": 2}, r"batch_size \(was 3, is 2\)"),
        ({"iters": 8}, "of step 8 already; raise it"),
    ],
)
def test_what_differs_is_named(options, changes, message):
    train(options(iters=8))
    with pytest.raises(EdgeLoraError, match=message):
        train(options(resume=True, **changes))


def test_the_adapter_of_a_finished_run_is_that_of_its_last_checkpoint(options):
    """A kill between the last checkpoint and the adapter leaves an older adapter."""
    config = options(iters=8, save_every=4)
    train(config)
    folder = Path(config.adapter_path)
    last = (folder / "adapters.safetensors").read_bytes()
    older = folder / "0000004_adapters.safetensors"
    (folder / "adapters.safetensors").write_bytes(older.read_bytes())
    assert older.read_bytes() != last
    with pytest.raises(EdgeLoraError, match="of step 8 already"):
        train(options(iters=8, save_every=4, resume=True))
    assert (folder / "adapters.safetensors").read_bytes() == last


def test_a_change_is_accepted_by_its_name(options):
    train(options(iters=8))
    changes = {"max_grad_norm": 1.0, "resume": True}
    with pytest.raises(EdgeLoraError, match="--accept-changes max_grad_norm"):
        train(options(**changes))
    train(options(accept_changes="max-grad-norm", **changes))


def test_other_rows_are_refused(options, tiny, tmp_path):
    train(options(iters=8))
    make_data(tmp_path / "other", rows=9, splits=("train",))
    with pytest.raises(EdgeLoraError, match=r"resume: data .* --accept-changes data"):
        train(options(resume=True, data=str(tmp_path / "other")))


def test_checkpoints_are_kept_in_number(options):
    train(options(save_every=2, keep_checkpoints=3))
    folder = Path(options().adapter_path) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["0000008", "0000010", "0000011"]


def test_the_best_adapter_is_kept(options):
    config = options(val_batches=-1, steps_per_eval=2, save_best=True, iters=6)
    finetune(config, notify=silent)
    best = Path(config.adapter_path) / "best"
    assert {path.name for path in best.iterdir()} == {"adapters.safetensors", "adapter_config.json"}


def test_a_run_ends_in_time(options, tmp_path):
    expected = train(options(adapter_path=str(tmp_path / "whole")))
    result = finetune(options(max_time=1e-6), notify=silent)
    assert result.iterations == 1
    assert_same(train(options(resume=True)), expected)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_ends_the_run_after_the_step(options, tmp_path, number, capfd):
    expected = train(options(adapter_path=str(tmp_path / "whole")))

    class Signals(EndsAt):
        def on_train_loss_report(self, info):
            if info["iteration"] == self.step:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        finetune(options(), [Signals(2)], silent)
    assert stopped.value.status == 128 + number
    assert signal.getsignal(number) == before
    out, err = capfd.readouterr()
    assert "ended after step 2 of 11; the same command with --resume goes on" in out
    assert "once more ends it at once" in err
    assert_same(train(options(resume=True)), expected)


def test_every_changed_bit_of_a_checkpoint_is_refused(options):
    train(options(iters=4))
    folder = find_checkpoint(Path(options().adapter_path)).folder
    generator = np.random.default_rng(0)
    for path in folder.iterdir():
        whole = path.read_bytes()
        for place in generator.integers(0, len(whole) * 8, 60):
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(EdgeLoraError, match=r"damaged|version"):
                find_checkpoint(folder)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(EdgeLoraError, match="damaged"):
            find_checkpoint(folder)
        path.write_bytes(whole)
    find_checkpoint(folder)


def test_a_folder_is_one_runs_at_a_time(options):
    config = options()

    class Starts(EndsAt):
        def on_train_loss_report(self, info):
            if info["iteration"] == 1:
                with pytest.raises(EdgeLoraError, match="another run is writing to this folder"):
                    finetune(config, notify=silent)

    finetune(config, [Starts(1)], silent)


@pytest.mark.slow
def test_the_command_goes_on_with_the_options_of_the_run(options, tmp_path):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(options().to_dict()))
    start = [sys.executable, "-m", "mlx_edgelora.train"]
    subprocess.run([*start, "-c", config, "--max-time", "0.000001"], check=True, cwd=tmp_path)
    subprocess.run([*start, "--resume", options().adapter_path], check=True, cwd=tmp_path)
    expected = train(options(adapter_path=str(tmp_path / "whole")))
    assert_same(mx.load(f"{options().adapter_path}/adapters.safetensors"), expected)


@pytest.mark.slow
def test_overwriting_keeps_the_old_run_until_the_new_one_is_saved(options, monkeypatch):
    folder = Path(options().adapter_path)
    train(options(iters=8, val_batches=-1, steps_per_eval=4, save_best=True))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    over = options(iters=4, overwrite=True, val_batches=-1, steps_per_eval=4, save_best=True)

    def full(*arguments):
        raise EdgeLoraError("full")

    for place in ("save_adapters", "save_checkpoint"):
        with monkeypatch.context() as patch, pytest.raises(EdgeLoraError, match="full"):
            patch.setattr(f"mlx_edgelora.training.loop.{place}", full)
            finetune(dataclasses.replace(over, save_best=False), notify=silent)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    with pytest.raises(ZeroDivisionError):  # before its first save, but not of its best adapter
        finetune(over, [EndsAt(1)], silent)
    assert all(p.read_bytes() == before[p] for p in before if p.parent.name != "best")
    train(over)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000004"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000004_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "best",
        "checkpoints",
    ]


def test_a_run_that_ends_before_its_first_report_has_a_result(options):
    result = finetune(options(max_time=1e-6, steps_per_report=10), notify=silent)
    assert result.iterations == 1
    assert np.isfinite(result.train_loss)


def test_a_checkpoint_is_named_from_anywhere(options, tmp_path, monkeypatch):
    train(options(iters=4))
    folder = Path(options().adapter_path)
    for place, name in ((folder, "."), (folder / "checkpoints", "0000004"), (tmp_path, "adapters")):
        monkeypatch.chdir(place)
        assert Path(saved_options(Path(name))["adapter_path"]).resolve() == folder.resolve()
    shutil.copytree(folder / "checkpoints" / "0000004", tmp_path / "copy")
    assert saved_options(tmp_path / "copy")["adapter_path"] == str(folder)


def test_the_adapter_that_a_run_began_with_is_not_needed_to_resume(options, tmp_path):
    first = options(adapter_path=str(tmp_path / "first"), iters=2)
    train(first)
    began = {"resume_adapter_file": first.adapter_path}
    train(options(iters=4, **began))
    shutil.rmtree(first.adapter_path)
    Path(first.adapter_path).mkdir()
    train(options(resume=True, iters=5, **began))


def test_paths_are_those_of_the_working_folder_of_the_run(options, tiny, tmp_path, monkeypatch):
    """A run is resumed from another folder, and a Hub name stays one."""
    monkeypatch.chdir(tiny)
    train(options(model="model", data="data", iters=4, log=os.path.relpath(tmp_path / "log")))
    folder = Path(options().adapter_path)
    here = saved_options(folder)
    assert (here["model"], here["data"]) == ("model", "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = saved_options(folder)
    assert (found["model"], found["data"]) == (str(tiny / "model"), str(tiny / "data"))
    assert found["log"] == str(tmp_path / "log") and found["spill_dir"] is None
    finetune(TrainConfig.from_dict(found | {"iters": 6, "resume": True}), notify=silent)
    assert find_checkpoint(folder).state.step == 6
    hub = resuming._from_here({"model": "org/name", "log": ""}, str(tiny))
    assert hub == {}
