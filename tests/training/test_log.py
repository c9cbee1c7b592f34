import errno
import json

import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.training.log import RunLog

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
