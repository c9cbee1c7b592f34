"""How commands end: a sentence and a status, whatever happens."""

import os
import subprocess
import sys
from importlib import import_module

import pytest

from mlx_edgelora import command as endings
from mlx_edgelora.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_ends_with_a_traceback(name, monkeypatch, capsys):
    """What nobody foresaw, here in the first thing that all of them do."""

    def breaks(*arguments, **named):
        raise ZeroDivisionError("broken\nhere")

    module = import_module(f"mlx_edgelora.{COMMANDS[name][0]}")
    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", breaks)
    assert module.main([]) == endings.UNFORESEEN
    err = capsys.readouterr().err
    assert err.startswith("error: unexpected ZeroDivisionError: broken here; ")
    with pytest.raises(ZeroDivisionError):
        module.main(["--debug"])


def test_an_interrupt_while_a_command_is_imported(monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_edgelora.__main__.import_module", interrupt)
    assert main(["plan"]) == endings.INTERRUPTED


@pytest.mark.parametrize(
    ("closed", "status", "said"),
    [(True, endings.OUTPUT_CLOSED, ""), (False, endings.WRONG, "error: standard output cannot be")],
)
def test_an_output_that_takes_nothing(closed, status, said):
    code = (
        "import sys; from mlx_edgelora.command import command; "
        "sys.exit(command(lambda _: print('x') or 0)([]))"
    )
    if closed:
        reader, output = os.pipe()
        os.close(reader)
    elif os.path.exists("/dev/full"):
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("the system has no /dev/full")
    ended = subprocess.run(
        [sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(output)
    assert ended.returncode == status
    assert ended.stderr.startswith(said) and "Traceback" not in ended.stderr
    assert bool(ended.stderr) == bool(said)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_files_do_not_get_the_numbers_of_closed_streams(closed, tmp_path):
    code = (
        "import os, sys; from mlx_edgelora.command import command; "
        "run = lambda _: print('x') or os.write(2, b'y') and open('file', 'w').fileno(); "
        "number = command(run)([]); sys.exit(0 if number > 2 and sys.stdout.isatty() == 0 else 9)"
    )
    line = f'"$0" -c "$1" {closed}'
    ended = subprocess.run(
        ["sh", "-c", line, sys.executable, code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended
    assert (tmp_path / "file").read_bytes() == b""
