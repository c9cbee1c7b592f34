"""Computations that macOS ends, and other ends of a machine's means: one sentence, nothing lost."""

import contextlib
import importlib
import os
import subprocess
import sys
from typing import ClassVar

import mlx.core as mx
import pytest
from architectures import build
from tiny import run_options

from mlx_edgelora import train as command
from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.blocks.parts import BlockParts
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.mlx_settings import set_defaults, unset_defaults
from mlx_edgelora.model.weights import ResidentWeights
from mlx_edgelora.plan import main as plan
from mlx_edgelora.planner import machine
from mlx_edgelora.training import adapters, awake, loop, opening, rehearsal, verdict, verification
from mlx_edgelora.verify import main as verify

finetuning = importlib.import_module("mlx_edgelora.training.finetune")
TIMEOUT = (
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
)
LIMIT = "[metal::malloc] Resource limit (499000) exceeded."
ENDED = "macOS ended a computation on the GPU, which kept the display waiting or took too long ("
HELP = (
    "let the display sleep while caffeinate keeps the Mac awake, lower max_seq_length or "
    "batch_size, or leave the GPU time for the display with --duty 0.5; "
)


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """run(**changes) -> exit status and the error's sentence."""

    def call(main=command.main, **changes):
        options = run_options(tiny, tmp_path) | {"verify": "off", "iters": 5} | changes
        status = main([f"--{name.replace('_', '-')}={value}" for name, value in options.items()])
        error = capsys.readouterr().err
        assert "Traceback" not in error and error.count("\n") == bool(status)
        return status, error.removeprefix("error: ").strip()

    return call


@pytest.fixture
def at_step(monkeypatch):
    """at_step() -> the step of training that was begun last, 0 before the first."""
    begun, step, init = [], loop._Run.step, loop._Run.__init__

    def counted(self, iteration, batch):
        begun[:] = [iteration]
        step(self, iteration, batch)

    def anew(self, *args):
        begun.clear()
        init(self, *args)

    monkeypatch.setattr(loop._Run, "__init__", anew)
    monkeypatch.setattr(loop._Run, "step", counted)
    return lambda: begun[0] if begun else 0


def failing(monkeypatch, owner, name, when, text=TIMEOUT):
    """Let a function raise what MLX does, as often as `when()` is true; gives how often."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        if when():
            calls.append(args)
            raise RuntimeError(text)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)
    return calls


def adapter(folder):
    return (folder / "adapters" / "adapters.safetensors").read_bytes()


def adapter_of(run, tmp_path, steps):
    """The bytes of the adapter of an undisturbed run."""
    assert run(iters=steps, adapter_path=tmp_path / "undisturbed" / "adapters") == (0, "")
    return adapter(tmp_path / "undisturbed")


def test_a_step_that_is_ended_loses_none_before_it(run, at_step, monkeypatch, tmp_path):
    expected = adapter_of(run, tmp_path, 2)
    failing(monkeypatch, Engine, "backward", lambda: at_step() == 3)
    status, sentence = run()
    assert status == 2
    assert sentence.startswith(f"step 3: {ENDED}[METAL] Command buffer execution failed: Caused G")
    file = tmp_path / "adapters" / "adapters.safetensors"
    assert sentence.endswith(f"{HELP}the last good adapter, of step 2, is in {file}")
    assert adapter(tmp_path) == expected


def test_the_first_step(run, at_step, monkeypatch, tmp_path):
    failing(monkeypatch, Engine, "backward", lambda: at_step() == 1)
    status, sentence = run()
    assert status == 2 and sentence.startswith(f"step 1: {ENDED}")
    assert "no adapter was saved yet in this run" in sentence
    assert not (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_an_update_that_is_ended_is_not_saved_by_half(run, at_step, monkeypatch, tmp_path):
    failing(monkeypatch, ResidentAdapterState, "_update_block", lambda: at_step() == 3)
    status, sentence = run(adapters="resident", save_every=2)
    assert status == 2
    assert "the last good adapter, of step 2, is in" in sentence
    assert adapter(tmp_path) == (tmp_path / "adapters/0000002_adapters.safetensors").read_bytes()


def test_a_validation_that_is_ended(run, at_step, monkeypatch, tmp_path):
    expected = adapter_of(run, tmp_path, 3)
    failing(monkeypatch, Engine, "loss", lambda: at_step() == 3)
    status, sentence = run(val_batches=-1, steps_per_eval=4)
    assert status == 2 and sentence.startswith(f"step 4: {ENDED}")
    assert "the last good adapter, of step 3, is in" in sentence
    assert adapter(tmp_path) == expected


@pytest.mark.parametrize(("times", "saved"), [(1, 4), (99, 2)])
def test_a_save_that_is_ended_is_tried_once_more(run, at_step, monkeypatch, tmp_path, times, saved):
    expected = adapter_of(run, tmp_path, saved)
    calls = failing(
        monkeypatch, adapters, "first_non_finite", lambda: at_step() == 4 and len(calls) < times
    )
    status, sentence = run(save_every=2)
    assert (status, len(calls)) == (2, min(times, 2))
    assert sentence.startswith(f"step 4: {ENDED}")
    assert f"the last good adapter, of step {saved}, is in" in sentence
    assert adapter(tmp_path) == expected


def test_what_else_was_ended_in_the_step_does_not_stop_the_save(run, at_step, monkeypatch):
    """MLX raises once more, for another computation that was waiting, and then no longer."""
    waiting = [TIMEOUT]
    failing(monkeypatch, Engine, "backward", lambda: at_step() == 3)
    failing(monkeypatch, mx, "synchronize", lambda: at_step() == 3 and waiting.pop())
    failing(monkeypatch, adapters, "first_non_finite", lambda: at_step() == 3 and waiting)
    assert "the last good adapter, of step 2, is in" in run()[1]


@pytest.mark.parametrize(
    ("owner", "name", "changes"),
    [
        (machine, "measure_rates", {}),
        (opening, "measure_and_replan", {}),
        (rehearsal, "measure_pass", {"memory_budget": "60MB"}),
        (verdict, "_differences", {"verify": "on"}),
    ],
    ids=["rates", "measuring", "rehearsal", "verification"],
)
def test_before_the_first_step(run, monkeypatch, tmp_path, owner, name, changes):
    monkeypatch.setattr(rehearsal, "NEAR", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = failing(monkeypatch, owner, name, lambda: True)
    status, sentence = run(**changes)
    assert (status, len(calls)) == (2, 1)
    assert sentence.startswith(ENDED)
    assert sentence.endswith(f"an adapter saved before is unchanged in {tmp_path / 'adapters'}")


def test_while_the_test_set_is_evaluated(run, monkeypatch, tmp_path):
    failing(monkeypatch, finetuning, "evaluate", lambda: True)
    status, sentence = run(lambda argv: command.main([*argv, "--train", "--test"]))
    assert status == 2 and sentence.startswith(ENDED)
    assert adapter(tmp_path)


def test_the_command_that_plans(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failing(monkeypatch, machine, "measure_rates", lambda: True)
    status, sentence = run(plan)
    assert status == 2 and sentence.startswith(ENDED)


def test_the_command_that_verifies(run, monkeypatch):
    """What plain MLX could not compute is no verdict on it, where macOS ended the computation."""
    failing(monkeypatch, verification._GradientComparison, "_plain", lambda: True)
    status, sentence = run(verify)
    assert status == 2 and sentence.startswith(ENDED)


@pytest.mark.parametrize(("owner", "name"), [(Tiling, "_compare"), (BlockParts, "output_rows")])
def test_a_trial_that_was_ended_says_nothing_about_a_block(monkeypatch, owner, name):
    failing(monkeypatch, owner, name, lambda: True)
    sources = ResidentWeights(), ResidentWeights()
    with pytest.raises(RuntimeError, match="Command buffer"):
        Tiling(checked_blocks(build("llama", vocab_size=101)), sources).tileable(0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LIMIT, "MLX holds more buffers than the system allows ([metal::malloc] Resource limit"),
        ("[metal::malloc] Attempting to allocate 9 bytes", "out of memory ([metal::malloc] Att"),
        ("Command buffer execution failed: Insufficient Memory", "out of memory (Command buffer"),
    ],
)
def test_other_means_that_run_out(run, at_step, monkeypatch, tmp_path, text, expected):
    expected_adapter = adapter_of(run, tmp_path, 2)
    failing(monkeypatch, Engine, "backward", lambda: at_step() == 3, text)
    status, sentence = run()
    assert status == 2 and sentence.startswith(f"step 3: {expected}")
    assert ("batch_size" in sentence) == ("Resource" not in text)
    assert adapter(tmp_path) == expected_adapter


def test_any_other_error_in_a_step_comes_through(run, at_step, monkeypatch, tmp_path):
    failing(monkeypatch, Engine, "backward", lambda: at_step() == 3, "shapes differ")
    status, sentence = run()
    assert status == 70 and sentence.startswith("unexpected RuntimeError: shapes differ; ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(lambda argv: command.main([*argv, "--debug", "--overwrite"]))


# The driver's own limit


@pytest.mark.parametrize(
    ("system", "before", "expected"),
    [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, "None")],
)
def test_the_driver_is_asked_for_more_time_before_mlx_is_loaded(system, before, expected):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AGX_")}
    if before is not None:
        environment["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"] = before
    code = (
        f"import os, sys; sys.platform = {system!r}; import mlx_edgelora; "
        "assert not any(name.startswith('mlx.') for name in sys.modules); "
        "print(os.environ.get('AGX_RELAX_CDM_CTXSTORE_TIMEOUT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_cuda_gets_small_graphs_unless_the_user_or_plain_mlx_wants_others(monkeypatch):
    name = "MLX_MAX_OPS_PER_BUFFER"
    for system, before, during, after in (
        ("linux", None, "8", None),
        ("linux", "40", "40", "40"),
        ("darwin", None, None, None),
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "platform", system)
        if before is not None:
            monkeypatch.setenv(name, before)
        set_defaults()
        assert os.environ.get(name) == during
        unset_defaults()
        assert os.environ.get(name) == after


# Sleep


class Process:
    """In place of a program that was started."""

    started: ClassVar[list] = []

    def __init__(self, command, **streams):
        assert set(streams.values()) == {subprocess.DEVNULL}
        self.command, self.events = command, []
        self.started.append(self)

    def terminate(self):
        self.events.append("terminate")

    def wait(self):
        self.events.append("wait")


@pytest.fixture
def started(monkeypatch):
    """The programs that a run starts on macOS."""
    monkeypatch.setattr(awake.sys, "platform", "darwin")
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(awake.subprocess, "Popen", Process)
    return Process.started


@pytest.mark.parametrize("fails", [False, True])
def test_a_mac_is_kept_awake_as_long_as_the_run_lasts(started, fails):
    with contextlib.suppress(KeyboardInterrupt), awake.keep_awake(True):
        (process,) = started
        assert process.command == ["caffeinate", "-i", "-w", str(os.getpid())]
        assert process.events == []
        if fails:
            raise KeyboardInterrupt
    assert process.events == ["terminate", "wait"]


def test_nothing_is_started_where_it_is_not_wanted_or_not_there(started, monkeypatch):
    with awake.keep_awake(False):
        assert started == []
    monkeypatch.setattr(awake.sys, "platform", "linux")
    with awake.keep_awake(True):
        assert started == []
    monkeypatch.setattr(awake.sys, "platform", "darwin")

    def missing(*_, **__):
        raise FileNotFoundError("caffeinate")

    monkeypatch.setattr(awake.subprocess, "Popen", missing)
    with awake.keep_awake(True):
        pass


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_keeps_awake_unless_it_is_told_not_to(run, monkeypatch, wanted):
    asked = []

    @contextlib.contextmanager
    def keeping(wanted):
        asked.append(wanted)
        yield

    monkeypatch.setattr(finetuning, "keep_awake", keeping)
    flags = [] if wanted else ["--no-caffeinate"]
    assert run(lambda argv: command.main([*argv, *flags]), iters=1) == (0, "")
    assert asked == [wanted]
