"""`mlx-edgelora report`, and `train --report`: one path, from the same records."""

import re
import subprocess
import sys

import pytest
from logs import lines_of, whole_log
from tiny import run_options

from mlx_edgelora import EdgeLoraError, TrainConfig, TrainingCallback, finetune
from mlx_edgelora.report.__main__ import EXAMPLE, main


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(lines_of(whole_log())))
    return path


def refused(argv, capsys):
    assert main(list(map(str, argv))) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text.removeprefix("error: ")


@pytest.mark.parametrize("output", [None, "other.html"])
def test_a_page_of_a_log(log, output, capsys):
    target = log.with_name(output or "run.html")
    assert main([str(log), *(["--output", str(target)] if output else [])]) == 0
    assert capsys.readouterr().out == f"The report is in {target}\n"
    assert "Llama-3.2-3B" in target.read_text()


def test_a_log_is_read_without_mlx_lm(log):
    code = "import sys; from mlx_edgelora.report.__main__ import main; main(sys.argv[1:]); "
    code += "assert 'mlx_lm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(log)], check=True, capture_output=True)


def test_logs_that_are_none(tmp_path, log, capsys):
    text = refused([tmp_path / "none.jsonl"], capsys)
    assert text.startswith(
        f"{tmp_path}/none.jsonl: cannot be read (No such file or directory), exp"
    )
    assert "cannot be read (Is a directory)" in refused([tmp_path, "--output", "x.html"], capsys)
    assert "is the log, expected another file" in refused([log, "--output", log], capsys)
    assert "unrecognized arguments: --out" in refused([log, "--out", "x"], capsys)
    (tmp_path / "text.txt").write_text("a line\n")
    assert "1 lines without a record" in refused([tmp_path / "text.txt"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl", "text.txt"]


@pytest.fixture
def options(tiny, tmp_path):
    return run_options(tiny, tmp_path) | {"steps_per_report": 1, "val_batches": 1}


def without_log(text):
    """What differs between two runs of the same options."""
    return re.sub(r"[\d.,:]+", "", text)


def test_a_run_and_its_log_give_the_same_page(options, tmp_path):
    log, target = tmp_path / "run.jsonl", tmp_path / "direct.html"
    finetune(TrainConfig(**options, log=str(log), report=str(target)), notify=str)
    assert main([str(log)]) == 0
    assert log.with_suffix(".html").read_text() == target.read_text()
    text = target.read_text()
    for words in (
        "finished, step 2 of 2",
        "Memory of one step, by phase and block",
        "rank 8 on all",
    ):
        assert words in text
    alone = options | {"overwrite": True, "report": str(tmp_path / "alone.html")}
    finetune(TrainConfig(**alone), notify=str)
    assert without_log((tmp_path / "alone.html").read_text())[:500] == without_log(text)[:500]
    assert not (tmp_path / "alone.jsonl").exists()


class Stop(TrainingCallback):
    def __init__(self, error):
        self._error = error

    def on_train_loss_report(self, train_info):
        raise self._error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "interrupted after step 1 of 2"),
        (EdgeLoraError("the callback's <reason>"), "the callback&#x27;s &lt;reason&gt;"),
    ],
)
def test_a_run_that_ends_early_has_a_page(options, tmp_path, error, words):
    config = TrainConfig(**options, report=str(tmp_path / "run.html"))
    with pytest.raises(type(error)):
        finetune(config, [Stop(error)], str)
    text = (tmp_path / "run.html").read_text()
    assert words in text and "Memory of one step, by phase and block" in text


def test_a_run_that_never_began_has_none(options, tmp_path):
    config = TrainConfig(**options | {"data": str(tmp_path)}, report=str(tmp_path / "run.html"))
    with pytest.raises(EdgeLoraError, match="train"):
        finetune(config, notify=str)
    assert not (tmp_path / "run.html").exists()


def test_a_report_that_cannot_be_written_is_refused_before_the_run(options, tmp_path):
    lines = []
    with pytest.raises(EdgeLoraError, match="none is not a folder"):
        finetune(TrainConfig(**options, report=str(tmp_path / "none/r.html")), notify=lines.append)
    assert lines == []


def test_a_test_alone_has_a_page(options, tmp_path):
    finetune(TrainConfig(**options), notify=str)
    config = TrainConfig(**options, test=True, report=str(tmp_path / "test.html"))
    finetune(config, notify=str)
    assert "Test loss" in (tmp_path / "test.html").read_text()


@pytest.mark.slow
def test_without_a_log_it_is_an_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"The report is in {EXAMPLE}\n")
    assert "Try it" not in out  # the adapter is gone
    text = (tmp_path / EXAMPLE).read_text()
    assert "the tiny model of this package" in text and "An answer before and after" in text
    assert [path.name for path in tmp_path.iterdir()] == [EXAMPLE]
