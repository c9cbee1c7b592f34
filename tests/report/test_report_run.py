"""Logs are read: whole ones, long ones, damaged ones, and those of others."""

import json

import pytest
from logs import END, lines_of, loss_record, run_record, whole_log

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.report.run import MOST_POINTS, Curve, read_run


def test_everything_in_a_log():
    run = read_run(lines_of(whole_log()), "run.jsonl")
    assert (run.count, run.unread, run.step, run.seconds, run.tokens) == (1, 0, 100, 250.0, 100_000)
    assert [step for step, _ in run.val_loss.points] == [0, 49]
    assert len(run.train_loss.points) == len(run.speed.points) == 20
    assert len(run.peak.points) == len(run.process.points) == 22
    assert run.peak.high == 3_604_000_000
    assert run.event("end") == {"status": "finished"}


def test_the_last_of_several_runs():
    older = [run_record(model="old"), loss_record(5), loss_record(10)]
    run = read_run(lines_of([*older, run_record(model="new"), loss_record(5, loss=1.0)]), "log")
    assert run.count == 2 and run.event("run")["model"] == "new"
    assert run.train_loss.points == [(5, 1.0)]


def test_runs_without_a_header_are_told_apart_by_their_steps():
    records = [loss_record(step) for step in (5, 10, 5, 10, 15)]
    run = read_run(lines_of(records), "log")
    assert run.count == 2 and [step for step, _ in run.train_loss.points] == [5, 10, 15]


def test_records_of_mlx_lm_callbacks():
    records = [
        {"iteration": 0, "val_loss": 3.5, "val_time": 2.0},
        {
            "iteration": 10,
            "train_loss": 2.5,
            "learning_rate": 1e-5,
            "iterations_per_second": 0.5,
            "tokens_per_second": 99.0,
            "trained_tokens": 2000,
            "peak_memory": 1.25,
        },
    ]
    run = read_run(lines_of(records), "log")
    assert run.peak.points == [(10, 1.25e9)] and run.speed.points == [(10, 99.0)]
    assert run.val_loss.points == [(0, 3.5)] and run.seconds is None


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_half_a_record_at_the_end(cut):
    last = lines_of([loss_record(10)])[0]
    run = read_run([*lines_of([run_record(), loss_record(5)]), last[:cut]], "log")
    assert run.unread == 1 and run.step == 5


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe\x00", b"[" * 100_000, b"[1]", b"5", b"null", b'{"else": 1}', b"Iter 10: loss 3"],
    ids=lambda line: line[:8],
)
def test_lines_that_are_no_records_are_counted(line):
    run = read_run([line + b"\n", b"\n", *lines_of([loss_record(5)])], "log")
    assert run.unread == 1 and run.step == 5
    with pytest.raises(EdgeLoraError, match="log: 2 lines without a record of a training run, exp"):
        read_run([line, line], "log")


def test_an_empty_log():
    with pytest.raises(EdgeLoraError, match=r"run\.jsonl: an empty file, expected the file that a"):
        read_run([], "run.jsonl")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", "true", '"5"', "null", "9" * 4000])
def test_a_value_that_is_no_number_is_passed_over(value):
    line = json.dumps(loss_record(10)).replace('"train_loss": ', f'"train_loss": {value}, "was": ')
    run = read_run([*lines_of([loss_record(5)]), line.encode()], "log")
    assert [step for step, _ in run.train_loss.points] == [5] and run.step == 10


@pytest.mark.parametrize("count", [1, 511, 512, 513, 100_001])
def test_a_long_log_takes_few_points(count):
    mean, highest = Curve(), Curve(highest=True)
    for step in range(count):
        mean.add(step, step % 2)
        highest.add(step, step % 2)
    for curve in (mean, highest):
        assert len(curve.points) <= MOST_POINTS
        assert curve.points[-1][0] == count - 1
        assert [step for step, _ in curve.points] == sorted(step for step, _ in curve.points)
    if count == 100_001:
        assert {value for _, value in mean.points[:-1]} == {0.5}
        assert {value for _, value in highest.points[:-1]} == {1}
    assert (mean.first, mean.last, mean.low) == (0, (count - 1) % 2, 0)


def test_a_run_that_has_only_begun():
    assert read_run(lines_of([run_record()]), "log").step == -1
    assert read_run(lines_of([run_record(), END]), "log").event("end")["status"] == "finished"
