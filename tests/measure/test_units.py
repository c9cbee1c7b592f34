"""One way to write sizes and times."""

import pytest

from mlx_edgelora.measure.units import clock, duration, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (18_430, "18.4 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (16_500_000, "16.5 MB"),
        (512_000_000, "512 MB"),
        (4_200_000_000, "4.20 GB"),
        (128 * 10**9, "128 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.50512, "0.505 s"), (12.34, "12.3 s"), (119, "119 s"), (2700, "45 min"), (27000, "7.5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (26.6, "0:27"), (725, "12:05"), (11099, "3:04:59")]
)
def test_clocks(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (12_300_001, "12.4 MB"),
        (12_300_000, "12.3 MB"),
        (999_600_000, "1.00 GB"),
        (1_234_000_000, "1.24 GB"),
        (999_200_000, "1000 MB"),
    ],
)
def test_what_is_needed_is_rounded_up(count, text):
    assert size(count, up=True) == text
