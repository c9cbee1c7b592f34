"""No command prints a line that is wider than a terminal of 80 columns (the benchmark: 100)."""

import pytest
from test_doctor import SMALL

from mlx_edgelora import doctor, plan, train, verify

RUN = ["--model", "model", "--data", "data", "--cache-dir", "cache", "--num-layers", "-1"]
RUN += ["--max-seq-length", "64", "--batch-size", "2"]
TRAIN = [*RUN, "--adapter-path", "adapters", "--iters", "3", "--steps-per-report", "1"]


@pytest.fixture
def printed(tiny, tmp_path, monkeypatch, capsys):
    """printed(main, argv) -> the lines of a command that works in a folder of its own."""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(tiny / name)
    monkeypatch.chdir(tmp_path)  # a path is never broken, so it must be short

    def run(main, argv, *arguments):
        assert main(argv, *arguments) in (0, 1)
        found = capsys.readouterr()
        assert found.err == ""
        return found.out.splitlines()

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ["--memory-budget", "min", "--verbose", "--memory-profile", "profile"],
        ["--memory-budget", "1GB", "--learning-rate", "1e-4", "--train", "--test"],
        ["--loss", "approximate", "--loss-k", "5", "--verbose"],
    ],
    ids=["min", "plenty", "approximate"],
)
def test_train(printed, flags):
    lines = printed(train.main, [*TRAIN, *flags])
    assert any(line.endswith("lr  grad norm") for line in lines)
    assert lines[-1] == '  mlx-edgelora generate --adapter-path adapters --prompt "..."'
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("budget", ["1MB", "1GB", "min"])
def test_plan(printed, budget):
    assert max(map(len, printed(plan.main, [*RUN, "--memory-budget", budget]))) <= 80


def test_verify(printed):
    assert max(map(len, printed(verify.main, RUN))) <= 80


@pytest.mark.slow
def test_doctor(printed):
    assert max(map(len, printed(doctor.main, [], SMALL))) <= 80


def test_a_command_to_try_that_is_long_goes_on_below():
    command = train.command_to_try("my adapters of the third day of the second experiment")
    assert command.splitlines() == [
        "  mlx-edgelora generate \\",
        "      --adapter-path 'my adapters of the third day of the second experiment' \\",
        '      --prompt "..."',
    ]
