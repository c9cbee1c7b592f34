"""The console command: its list of commands, their help, and each without options."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from mlx_edgelora import EdgeLoraError, finetune
from mlx_edgelora.__main__ import COMMANDS, main
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.config.command_line import GROUPS, IN_FILE


def test_the_console_command_is_the_module():
    (script,) = entry_points(group="console_scripts", name="mlx-edgelora")
    assert script.load() is main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_all_commands_are_listed(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"mlx-edgelora \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_no_such_command(capsys):
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: got 'trian', expected one of")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_names_the_command(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "") and out.startswith(f"usage: mlx-edgelora {name} ")
    assert max(map(len, out.splitlines())) <= 80


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "mlx_edgelora", "plan", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == "" and found.stdout.startswith("usage: mlx-edgelora plan ")


def test_every_option_is_in_one_group_of_the_help():
    named = [name for names in GROUPS.values() for name in names]
    options = {field.name: field.metadata["kind"] for field in dataclasses.fields(TrainConfig)}
    in_file = [name for name, kind in options.items() if kind.parse is None]
    assert sorted(named + in_file) == sorted(options)
    assert all(name in IN_FILE for name in in_file)


def test_every_help_text_is_a_sentence_with_its_default():
    for field in dataclasses.fields(TrainConfig):
        kind, text = field.metadata["kind"], field.metadata["help"]
        assert text[0].isupper() or text.startswith("min"), text
        assert text.endswith("."), text
        if kind.parse is not None and field.default is None and field.name not in NO_DEFAULT:
            assert "Default: " in text, field.name


# Nothing happens without them.
NO_DEFAULT = {
    "config",
    "resume_adapter_file",
    "resume",
    "accept_changes",
    "epochs",
    "report_to",
    "project_name",
    "log",
    "report",
    "quantize",
    "plan",
    "plan_out",
    "memory_profile",
}


def test_plan_without_options_is_of_the_embedded_run(capsys):
    assert main(["plan"]) == 0
    assert "adapters of rank 8 on 4 of 4 blocks" in capsys.readouterr().out


def test_verify_without_options_is_of_the_embedded_run(capsys):
    assert main(["verify"]) == 0
    assert "head and loss" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "count"), [(None, 4), (2, 2)])
def test_the_default_number_of_layers_is_up_to_16(asked, count, tmp_path):
    """A number that is given stays strict; the adapter says what was adapted."""
    options = {"iters": 1, "val_batches": 0, "adapter_path": str(tmp_path), "overwrite": True}
    lines = []
    config = TrainConfig.from_dict(options | ({} if asked is None else {"num_layers": asked}))
    finetune(config, notify=lines.append)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["num_layers"] == count
    assert any("all 4 blocks are adapted" in line for line in lines) == (asked is None)
    with pytest.raises(EdgeLoraError, match="num_layers: got 5, but the model has 4 blocks"):
        finetune(dataclasses.replace(config, num_layers=5), notify=lines.append)
