import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from training_helpers import RECORD_KEYS

from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.training.progress import Progress
from mlx_edgelora.training.report import LossReport, Usage, UsageMeter, Window

REPORT = LossReport(
    kind="train_loss",
    iteration=20,
    loss=2.5,
    learning_rate=1e-4,
    trained_tokens=5000,
    tokens=1000,
    seconds=4.0,
    batches=10,
    read_bytes=50_000_000,
    written_bytes=20_000_000,
    usage=Usage(
        peak_memory_bytes=1_200_000_000,
        footprint_bytes=1_500_000_000,
        disk_read_bytes=100_000_000,
        disk_write_bytes=40_000_000,
        time=8.0,
    ),
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_when_not_a_terminal():
    lines, live = io.StringIO(), io.StringIO()
    with Progress(100, lines, live) as progress:
        progress.step(REPORT)
        with progress.validation(2) as advance:
            advance()
        progress.report(replace(REPORT, kind="val_loss", iteration=0))
        progress.report(REPORT)
        progress.saved(20, Path("adapters"))
    assert live.getvalue() == ""
    assert lines.getvalue().splitlines() == [
        "       step train loss  val loss   tok/s     peak      left        lr",
        "      0/100                2.500          1.20 GB",
        "     20/100      2.500               250  1.20 GB      0:32  1.00e-04",
        "     20/100  adapter saved in adapters",
    ]


def test_verbose_has_more_columns():
    lines = io.StringIO()
    with Progress(100, lines, io.StringIO(), verbose=True) as progress:
        progress.report(REPORT)
    title, row = lines.getvalue().splitlines()
    assert title.endswith("  process     read  written") and len(title) == len(row)
    assert row.endswith("  1.50 GB  5.00 MB  2.00 MB")


def test_no_row_is_wider_than_a_terminal():
    lines = io.StringIO()
    usage = replace(REPORT.usage, peak_memory_bytes=10**12)
    long = replace(REPORT, iteration=10**5, loss=123.456, tokens=10**8, seconds=10**3, usage=usage)
    with Progress(10**5, lines, io.StringIO()) as progress:
        progress.report(long)
    assert max(map(len, lines.getvalue().splitlines())) <= 80


def test_a_live_line_on_a_terminal():
    lines, live = io.StringIO(), Terminal()
    with Progress(2, lines, live) as progress:
        progress.step(REPORT)
        time.sleep(0.11)  # tqdm draws at most ten times a second
        progress.step(replace(REPORT, loss=1.25))
        progress.report(REPORT)
        assert "20/2      2.500" in lines.getvalue()
    shown = live.getvalue()
    assert "loss 1.250, 250 tok/s, peak 1.20 GB" in shown
    assert re.search(r"step 2/2 \|.*\| 00:00<00:00, loss", shown)


def test_validation_has_its_own_progress_on_a_terminal():
    live = Terminal()
    with Progress(2, io.StringIO(), live) as progress, progress.validation(3) as advance:
        for _ in range(3):
            advance()
    assert "validation" in live.getvalue()


def test_records_of_a_report():
    record = REPORT.record()
    assert list(record) == ["iteration", "train_loss", *RECORD_KEYS]
    assert record["tokens_per_second"] == 250.0
    assert REPORT.callback_info() == {
        **record,
        "iterations_per_second": 2.5,
        "peak_memory": 1.2,
    }
    validation = replace(REPORT, kind="val_loss")
    assert validation.callback_info() == {**validation.record(), "val_time": 4.0}
    assert "val_loss" in validation.record()
    assert "train_loss" not in validation.record()


def test_window_weighs_by_tokens_and_counts_only_its_own_traffic():
    disk = DiskMeter()
    disk.add_read(7)
    meter = UsageMeter(disk)
    disk.add_read(100)
    window = Window(meter)
    disk.add_read(30)
    disk.add_written(5)
    window.add(1.0, 10, 0.5)
    window.add(4.0, 30, 1.5)
    report = window.report("train_loss", iteration=2, learning_rate=0.1, trained_tokens=40)
    assert report.loss == pytest.approx(130 / 40)
    assert report.tokens_per_second == pytest.approx(20.0)
    assert (report.read_bytes, report.written_bytes) == (30, 5)
    assert report.usage.disk_read_bytes == 130
    assert report.usage.footprint_bytes > 1 << 20
