import io
import re
from dataclasses import replace
from pathlib import Path

import pyte
import pytest
from training_helpers import record_keys

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
    grad_norm=0.7187,
)


def test_a_table_when_not_a_terminal():
    lines, live = io.StringIO(), io.StringIO()
    with Progress(100, lines, live) as progress:
        progress.step(REPORT)
        with progress.validation(2) as advance:
            advance()
        progress.report(replace(REPORT, kind="val_loss", iteration=0))
        progress.report(REPORT)
        progress.report(replace(REPORT, iteration=30, grad_norm=None))
        progress.saved(30, Path("adapters"))
    assert live.getvalue() == ""
    assert lines.getvalue().splitlines() == [
        "   step  train loss  val loss    tok/s     peak      left        lr  grad norm",
        "  0/100                 2.500           1.20 GB",
        " 20/100       2.500                250  1.20 GB      0:32  1.00e-04      0.719",
        " 30/100       2.500                250  1.20 GB      0:28  1.00e-04",
        " 30/100  adapter saved in adapters",
    ]


def test_verbose_has_a_second_line():
    lines = io.StringIO()
    with Progress(100, lines, io.StringIO(), verbose=True) as progress:
        progress.report(REPORT)
    assert lines.getvalue().splitlines()[2] == (
        "         process 1.50 GB, 5.00 MB read and 2.00 MB written a step"
    )


def test_no_row_is_wider_than_a_terminal():
    lines = io.StringIO()
    usage = replace(REPORT.usage, peak_memory_bytes=999 * 10**9)
    long = replace(REPORT, iteration=10**5, loss=123.456, tokens=10**8, seconds=10**3, usage=usage)
    with Progress(10**5, lines, io.StringIO(), verbose=True) as progress:
        progress.report(replace(long, grad_norm=1.234e-5))
        progress.note("interrupted; " + "the last good adapter is in a folder " * 9)
    assert max(map(len, lines.getvalue().splitlines())) <= 80


class Screen(io.StringIO):
    def isatty(self):
        return True

    def lines(self, columns=80, rows=24):
        """What a terminal shows after all that was written; its cursor's place and visibility."""
        screen = pyte.Screen(columns, rows)
        pyte.Stream(screen).feed(self.getvalue().replace("\n", "\r\n"))
        return [line.rstrip() for line in screen.display], screen


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns with colours."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def test_a_bar_under_the_table_on_a_terminal(terminal):
    screen = Screen()
    with Progress(20, screen, screen) as progress:
        progress.report(REPORT)
        progress.step(replace(REPORT, iteration=1))
        progress.note("a note [of brackets]")
        progress._bars.refresh()  # as twice a second
        shown, _ = screen.lines()
    assert shown[:3] == [
        " step  train loss  val loss    tok/s     peak      left        lr  grad norm",
        "20/20       2.500                250  1.20 GB      0:00  1.00e-04      0.719",
        "a note [of brackets]",
    ]
    assert re.fullmatch(r"step 1/20 .* 0:08 left  loss 2\.500  250 tok/s  1\.20 GB", shown[3])
    assert len(shown[3]) <= 80
    after, state = screen.lines()
    assert not any("step 1/20" in line for line in after)
    assert after[2] == "a note [of brackets]" and (state.cursor.y, state.cursor.x) == (3, 0)


def test_validation_has_its_own_bar(terminal):
    screen = Screen()
    with Progress(2, screen, screen) as progress, progress.validation(3) as advance:
        for _ in range(2):
            advance()
        progress._bars.refresh()
        shown, _ = screen.lines()
    assert shown[0].startswith("step 0/2") and shown[1].startswith("validation 2/3")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_terminal_as_it_was(terminal, interrupt):
    screen = Screen()
    with pytest.raises(interrupt), Progress(5, screen, screen) as progress:
        progress.step(REPORT)
        raise interrupt
    shown, state = screen.lines()
    assert not any(shown) and not state.cursor.hidden
    assert "\x1b[?25l" not in screen.getvalue()  # whoever is killed cannot show the cursor again


def test_colours_only_where_they_are_wanted(terminal, monkeypatch):
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9]m")

    def drawn():
        screen = Screen()
        with Progress(2, screen, screen) as progress:
            progress.step(replace(REPORT, iteration=1))
            progress.report(REPORT)
        return screen.getvalue()

    assert set(colours.findall(drawn())) == {"\x1b[36m"}
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours.search(drawn())
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in drawn()


def test_the_bar_stays_where_the_table_goes_to_a_file(terminal):
    lines, screen = io.StringIO(), Screen()
    with Progress(2, lines, screen) as progress:
        progress.step(REPORT)
        progress.report(REPORT)
        progress.note("now")
    assert "\x1b" not in lines.getvalue() and "20/2 " in lines.getvalue()
    assert "loss 2.500" in screen.getvalue()


def test_a_narrow_terminal_has_fewer_columns(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    with Progress(50, screen, screen) as progress:
        progress.report(REPORT)
    assert screen.lines(40)[0][:2] == [
        " step  train loss  val loss    tok/s",
        "20/50       2.500                250",
    ]


def test_records_of_a_report():
    record = REPORT.record()
    assert list(record) == record_keys("train_loss")
    assert record["tokens_per_second"] == 250.0
    assert REPORT.callback_info() == {
        **record,
        "iterations_per_second": 2.5,
        "peak_memory": 1.2,
    }
    validation = replace(REPORT, kind="val_loss", grad_norm=None)
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
