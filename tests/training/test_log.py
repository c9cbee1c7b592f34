import contextlib
import errno
import json
from pathlib import Path

import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.training import log as training_log
from mlx_edgelora.training.log import RunLog, recorded

RECORD = {"iteration": 3, "train_loss": 1.5}


def test_a_record_is_on_file_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunLog(path) as log:
        log.write(RECORD)
        assert json.loads(path.read_text()) == RECORD


def test_a_second_run_appends(tmp_path):
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        with RunLog(path) as log:
            log.write(RECORD)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [RECORD, RECORD]


def test_half_a_record_of_a_killed_run_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"iteration": 1, "tra')
    with RunLog(path) as log:
        log.write(RECORD)
    assert json.loads(path.read_text().splitlines()[1]) == RECORD


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_never_written(tmp_path, value):
    path = tmp_path / "run.jsonl"
    with (
        RunLog(path) as log,
        pytest.raises(EdgeLoraError, match=r"run\.jsonl: iteration 3: learning_rate is (nan|inf)"),
    ):
        log.write({**RECORD, "learning_rate": value})
    assert path.read_text() == ""


def test_a_log_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"run\.jsonl: cannot be written \(No such file"):
        RunLog(tmp_path / "none" / "run.jsonl")


def test_a_full_disk_while_logging(tmp_path):
    class Full:
        def write(self, _text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    log = RunLog(tmp_path / "run.jsonl")
    log.close()
    log._file = Full()
    with pytest.raises(EdgeLoraError, match=r"run\.jsonl: cannot be written \(No space left"):
        log.write(RECORD)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_full_is_the_sentence_and_not_a_traceback(tmp_path):
    """Closing tries to write once more."""
    log = RunLog(tmp_path / "run.jsonl")
    log.close()
    log._file = Path("/dev/full").open("wb")  # noqa: SIM115 - the log closes it
    with pytest.raises(EdgeLoraError, match=r"cannot be written \(No space left"), log:
        log.write(RECORD)


def test_how_a_run_ended(make_config, tmp_path):
    config = make_config(log=str(tmp_path / "run.jsonl"))
    ends = []
    for error in (None, KeyboardInterrupt(), EdgeLoraError("why"), MemoryError()):
        expected = contextlib.suppress(KeyboardInterrupt, EdgeLoraError, MemoryError)
        with expected, recorded(config) as log:
            log.note("run", {})
            if error is not None:
                raise error
        ends.append(json.loads(Path(config.log).read_text().splitlines()[-1])["end"])
    assert ends == [
        {"status": "finished"},
        {"status": "interrupted"},
        {"status": "failed", "reason": "why"},
        {"status": "failed", "reason": "MemoryError"},
    ]


def test_nothing_is_said_of_a_run_that_never_began(make_config, tmp_path):
    with recorded(make_config()) as log:
        assert log is None
    config = make_config(log=str(tmp_path / "run.jsonl"), report=str(tmp_path / "run.html"))
    with recorded(config):
        pass
    assert Path(config.log).read_text() == "" and not Path(config.report).exists()


def test_the_first_error_is_told(make_config, tmp_path, monkeypatch):
    """A page that cannot be written either does not hide it."""
    config = make_config(report=str(tmp_path / "run.html"))
    monkeypatch.setattr(training_log, "write_report", fails)
    with pytest.raises(EdgeLoraError, match="the first"), recorded(config) as log:
        log.note("run", {})
        raise EdgeLoraError("the first")
    with pytest.raises(EdgeLoraError, match="the second"), recorded(config) as log:
        log.note("run", {})


def fails(*_):
    raise EdgeLoraError("the second")
