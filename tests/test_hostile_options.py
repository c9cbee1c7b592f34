"""Options, configuration files and paths that someone made to break the reader."""

import importlib
import os
import subprocess
import sys

import pytest

from mlx_edgelora.command import command
from mlx_edgelora.config import TrainConfig, config_from_cli
from mlx_edgelora.config.yaml_file import MOST_BYTES, read_yaml
from mlx_edgelora.errors import MOST_CHARACTERS, EdgeLoraError
from mlx_edgelora.evaluate import main as evaluate
from mlx_edgelora.export.__main__ import main as export
from mlx_edgelora.fuse import main as fuse

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("log: 2001-13-45", "line 1: is not valid YAML: '2001-13-45' is no timestamp"),
        ("\nseed: 0x_", "line 2: is not valid YAML: '0x_' is no int"),
        ("train: !!bool abc", "'abc' is no bool"),
        ("seed: !!int ''", "'' is no int"),
        ("seed: " + "9" * 5000, "is no int"),
        ("seed: " + "[" * 3000, "nested too deeply"),
        (BOMB, "more than 100000 values"),
        ("data: &d [*d]", "is part of itself"),
        ("x: &x {<<: *x}", "is part of itself"),
        ("#" * MOST_BYTES + "\n", "is larger than 200 kB"),
        ("log: '\\0'\ndata: \"\\ud800\"", "not valid YAML|expected text"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_yaml_is_refused_in_a_sentence(tmp_path, text, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(EdgeLoraError, match=sentence) as caught:
        TrainConfig.from_yaml(path)
    assert len(str(caught.value)) <= MOST_CHARACTERS


def test_yaml_with_anchors_is_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: &n 3\niters: *n\n")
    assert read_yaml(path) == {"seed": 3, "iters": 3}


@pytest.mark.parametrize(
    "option, sentence",
    [
        ({"iters": 2**31}, "at least 1, and at most 2147483647"),
        ({"learning_rate": 1e-320}, "above 0, from 1e-37 to 1e\\+38"),
        ({"learning_rate": 10**400}, "learning_rate: got a?[ 1].*above 0"),
        ({"seed": 10**5000}, "seed: got a number of thousands of digits"),
        ({"lora_parameters": {"scale": 1e39}}, "from 1e-37 to 1e\\+38"),
        ({"memory_budget": 2**64}, "memory_budget: got 18446744073709551616, expected min"),
        ({"clear_cache_threshold": "9" * 400 + "GB"}, "at most 1152921504606846976 bytes"),
        ({"adapter_path": "~nobody-has-this-name/a"}, "expected text: a path in UTF-8, where ~"),
        ({"log": "\udcff.jsonl"}, r"log: got '\\udcff.jsonl', expected text"),
        ({"system_prompt": "x" * 10**6 + "\ud800"}, r"xxx \[…\] xx"),
        ({"y" * 10**5: 1}, "unknown key"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_option(option, sentence):
    with pytest.raises(EdgeLoraError, match=sentence) as caught:
        TrainConfig.from_dict(option)
    assert len(str(caught.value)) < 600


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_from_cli(["--adapter-path=~/a", "--model=~/m", "--plan-out=~/p"])
    assert config.adapter_path == str(tmp_path / "a")
    assert (config.model, config.plan_out) == (str(tmp_path / "m"), str(tmp_path / "p"))
    assert TrainConfig(resume="~/r").resume == str(tmp_path / "r")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (fuse, ["--adapter-path=~/none"]),
        (evaluate, ["--adapter-path=~/none"]),
        (export, ["peft", "--adapter-path=~/none"]),
        (importlib.import_module("mlx_edgelora.import").main, ["--peft=~/none"]),
    ],
    ids=["fuse", "evaluate", "export", "import"],
)
def test_other_commands_know_the_home_folder(command, flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(flags) == 2
    assert f"{tmp_path}/none: " in capsys.readouterr().err


def test_messages_are_bounded_and_hold_no_control_characters(capsys):
    def run(argv):
        raise EdgeLoraError("place: \x1b[2J" + "x" * 10**7 + "; do this")

    assert command(run)([]) == 2
    printed = capsys.readouterr().err
    assert len(printed) < 1600
    assert "\x1b" not in printed
    assert printed.endswith("; do this\n")


def test_output_that_the_locale_cannot_encode_is_escaped():
    code = (
        "from mlx_edgelora.command import command\nimport sys\n"
        "sys.exit(command(lambda argv: print('ü\\udcff') or 0)([]))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "\\xfc\\udcff\n"), done.stderr
