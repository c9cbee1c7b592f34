"""Small forms of the scripts in dev/reliability, which kill and disturb runs."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "dev" / "reliability"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["kill_runs.py", "6"],
        ["kill_saves.py", "20"],
        ["faulty_disk.py", "resume", "kill", "50"],
        ["faulty_disk.py", "overwrite", "full", "100"],
    ],
    ids=" ".join,
)
def test_nothing_is_lost(arguments):
    command = [sys.executable, str(FOLDER / arguments[0]), *arguments[1:]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
