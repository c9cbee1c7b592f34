"""`python -m mlx_edgelora.benchmark`: what it prints and writes, and its exit status."""

import json
from pathlib import Path

import pytest

from mlx_edgelora.benchmark import __main__, run
from mlx_edgelora.benchmark.contenders import contenders
from mlx_edgelora.benchmark.report import COLUMNS, BenchmarkReport, ContextResults

pytestmark = [pytest.mark.slow, pytest.mark.alone]

FLAGS = ["--shape", "small", "--blocks", "1", "--contexts", "64", "--also", "cheats:trains_nothing"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The command with few contenders, one of whom cheats: exit status, folder, lines."""
    folder, lines = tmp_path_factory.mktemp("ran"), []
    names = ("mlx-lm", "cheats:trains_nothing", "mlx-edgelora, no limit")

    def few(*arguments, **options):
        return [rival for rival in contenders(*arguments, **options) if rival.name in names]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "contenders", few)
        patch.setattr("builtins.print", lambda text, **rest: lines.append(text))
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        flags = [*FLAGS, "--cache", str(folder / "cache"), "--output", str(folder / "out")]
        status = __main__.main(flags)
    return status, folder / "out", "\n".join(lines)


def test_a_cheat_is_shown_and_makes_the_command_fail(ran):
    status, _, text = ran
    assert status == 1
    assert "cheats:trains_nothing is INVALID: its loss drifts from mlx-lm's" in text
    assert "random small, 1 of 4 blocks, float32; 64 tokens, 30 % of them labelled" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_files(ran):
    _, folder, _ = ran
    report = json.loads((folder / "results.json").read_text())
    (context,) = report["contexts"]
    valid = {result["name"]: result["valid"] for result in context["results"]}
    assert valid.pop("cheats:trains_nothing") is False and all(valid.values())
    own = context["results"][-1]
    assert own["tokens_per_second"] == 64 / own["median_seconds"]
    assert len(own["steps"]) == 6 and len(own["ratios"]) == 5 and own["plan"]["reason"]
    assert own["peak"] < 35e6  # what measuring the machine takes is not in it
    assert context["movement"] > 1e-3
    assert report["command"].startswith("python -m mlx_edgelora.benchmark --shape small")
    assert {"processor", "cores"} <= report["machine"].keys() and report["versions"]["mlx"]
    text = (folder / "results.md").read_text()
    assert text.startswith("# Benchmark of random small, 1 of 4 blocks\n")
    assert "| " + " | ".join(COLUMNS) + " |" in text


def test_the_pictures(ran):
    pytest.importorskip("matplotlib")
    _, folder, _ = ran
    for name in ("peak-by-context", "time-against-peak", "step-memory"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    left = {"results.md", "results.json", "step-memory.png"}
    left |= {"peak-by-context.png", "time-against-peak.png"}
    assert {path.name for path in folder.iterdir()} == left


def test_pictures_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    report = BenchmarkReport(
        "", "", {}, {}, None, {"model": "none"}, contexts=[ContextResults(8, failed="gone")]
    )
    __main__.write(report, None, tmp_path, "llama-3.2-3b")
    assert (tmp_path / "peak-by-context.png").read_bytes().startswith(b"\x89PNG")
    assert "8 tokens: gone" in report.text() and not report.valid


def test_wrong_input_is_one_sentence(capsys):
    assert __main__.main(["--blocks", "3"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: --blocks: got it without --shape")


def test_a_row_of_the_ladder_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "LADDER", run.LADDER[-1:])
    flags = ["--shape", "small", "--blocks", "1", "--ladder", "--contexts", "64"]
    flags += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    assert __main__.main(flags) == 0
    (table_row,) = json.loads((tmp_path / "out" / "results.json").read_text())["ladder"]
    assert (
        table_row["how"] == "measured" and 0 < table_row["peak"] < 50e6 and table_row["seconds"] > 0
    )
    assert "+ paged adapters" in capsys.readouterr().out
