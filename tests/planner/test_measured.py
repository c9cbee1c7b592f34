"""What was measured is remembered, says how far formulas are off, and survives a broken file."""

import json

import pytest

from mlx_edgelora.planner.measured import (
    KNOWN,
    LIKELY,
    MODELS,
    UNKNOWN,
    Estimate,
    Measurement,
    Measurements,
)
from mlx_edgelora.planner.sizes import BatchShape

LOAD, LONGER = BatchShape(2, 100, 30), BatchShape(2, 400, 120)
WAY = (None, None, "fused", True, None, "block", None)
OTHER = (512, *WAY[1:])


def formula(way, batch_shape):
    return 10.0 * batch_shape.size * (1 if way[0] is None else 0.5)


def test_what_was_measured_is_what_is_expected():
    measurements = Measurements()
    assert measurements.bytes("forward", WAY, LOAD, formula) == Estimate(2000, UNKNOWN)
    assert measurements.seconds("forward", WAY, LOAD, formula) == 2000
    assert measurements.is_empty
    measurements.add("forward", WAY, LOAD, Measurement(5000, 3.0))
    assert not measurements.is_empty and measurements.find("forward", WAY, LOAD) == Measurement(
        5000, 3.0
    )
    assert measurements.bytes("forward", WAY, LOAD, formula) == Estimate(5000, KNOWN)
    assert measurements.seconds("forward", WAY, LOAD, formula) == 3.0
    assert measurements.bytes("backward", WAY, LOAD, formula) == Estimate(2000, UNKNOWN)


def test_what_is_like_it_says_how_far_the_formula_is_off():
    measurements = Measurements()
    measurements.add("forward", WAY, LOAD, Measurement(5000, 4000.0))
    assert measurements.bytes("forward", WAY, LONGER, formula) == Estimate(20000, LIKELY)
    assert measurements.seconds("forward", WAY, LONGER, formula) == 16000
    assert measurements.bytes("forward", OTHER, LOAD, formula) == Estimate(2500, LIKELY)
    # Of one way its own; of several loads the most bytes, and the least time.
    measurements.add("forward", OTHER, LOAD, Measurement(1000, 1000.0))
    assert measurements.bytes("forward", OTHER, LONGER, formula).value == 4000
    measurements.add("forward", OTHER, BatchShape(1, 100, 30), Measurement(1500, 4000.0))
    assert measurements.bytes("forward", OTHER, LONGER, formula).value == 12000
    assert measurements.seconds("forward", OTHER, LONGER, formula) == 4000


def test_a_long_tail_is_told_by_two_short_ones():
    measurements = Measurements()
    for kept, taken in ((1, Measurement(100, 1.0)), (3, Measurement(500, 2.0))):
        measurements.add("tail", (kept, 16, "fused"), LOAD, taken)
    assert measurements.find("tail", (3, 16, "fused"), LOAD) == Measurement(500, 2.0)
    assert measurements.find("tail", (28, 16, "fused"), LOAD) == Measurement(5500, 14.5)
    # Another program may have run during the first measurement.
    measurements.add("tail", (3, 16, "fused"), LOAD, Measurement(500, 0.9))
    assert measurements.find("tail", (28, 16, "fused"), LOAD).seconds == 1.0
    assert measurements.find("tail", (28, 40, "fused"), LOAD) is None
    assert measurements.find("tail", (28, 16, "fused"), LONGER) is None


def test_a_difference_of_two_short_tails_does_not_make_a_long_one_slow():
    """On an H200 keeping all blocks seemed slower than recomputing them, and was not tried."""
    measurements, way = Measurements(), (28, 16, "fused")
    measurements.add("tail", (1, 16, "fused"), LOAD, Measurement(100, 2.0))
    measurements.add("tail", (2, 16, "fused"), LOAD, Measurement(200, 3.0))
    assert measurements.seconds("tail", way, LOAD, lambda way, load: 10 + way[0]) == 38 * 2 / 11
    assert measurements.seconds("tail", way, LOAD, lambda way, load: way[0]) == 29.0
    measurements.add("tail", way, LOAD, Measurement(100, 60.0))
    assert measurements.seconds("tail", way, LOAD, lambda way, load: way[0]) == 60.0


def test_the_longest_tails_tell_of_a_longer_one_and_none_of_a_shorter_one():
    """The peak of a short one may be where the number of kept blocks does not matter."""
    measurements = Measurements()
    for kept, size in ((2, 150), (3, 200), (5, 400)):
        measurements.add("tail", (kept, 16, "fused"), LOAD, Measurement(size, 1.0))
    assert measurements.find("tail", (7, 16, "fused"), LOAD).bytes == 600
    # It was up to 15 % off, more than what was measured itself may be.
    assert measurements.bytes("tail", (7, 16, "fused"), LOAD, formula) == Estimate(600, LIKELY)
    assert measurements.bytes("tail", (5, 16, "fused"), LOAD, formula) == Estimate(400, KNOWN)
    assert measurements.find("tail", (1, 16, "fused"), LOAD) is None


def test_of_one_tail_another_takes_as_much_more_as_the_formula_says():
    measurements = Measurements()
    measurements.add("tail", (1, 16, "fused"), LOAD, Measurement(10**6, 1.0))
    estimate = measurements.bytes(
        "tail", (28, 16, "fused"), LOAD, lambda way, batch_shape: 100 * way[0]
    )
    assert estimate == Estimate(10**6 + 2700, LIKELY)


def test_it_is_kept_by_model(tmp_path):
    file = tmp_path / "new" / "measured.json"
    measurements = Measurements(file, "a model")
    measurements.add("forward", WAY, LOAD, Measurement(5000, 3.0))
    measurements.add("head", (16, "streamed"), LONGER, Measurement(7, 0.5))
    measurements.write()
    again, another = Measurements(file, "a model"), Measurements(file, "another")
    again.read()
    another.read()
    assert list(again.rows()) == list(measurements.rows()) and another.is_empty
    for number in range(MODELS):
        more = Measurements(file, f"model {number}")
        more.add("head", (16, "streamed"), LOAD, Measurement(7, 0.5))
        more.write()
    assert len(json.loads(file.read_text())["models"]) == MODELS
    again = Measurements(file, "a model")
    again.read()
    assert again.is_empty  # the oldest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 0, "models": {}}',
        '{"version": 1}',
        '{"version": 1, "models": []}',
        '{"version": 1, "models": {"a model": [1]}}',
        '{"version": 1, "models": {"a model": [["forward", [[]], [1, 2, 3], [4, 5]]]}}',
        '{"version": 1, "models": {"a model": [["forward", [], [1, 2], [4, 5]]]}}',
        '{"version": 1, "models": {"a model": [["load", [], [1, 2, 3], ["x", 5]]]}}',
        '{"version": 1, "models": {"a model": [["load", [], ["1", 2, 3], [4, 5]]]}}',
        '{"version": 1, "models": {"a model": [["load", [], [0, 2, 3], [4, 5]]]}}',
        '{"version": 1, "models": {"a model": [["load", [], [1, 2, Infinity], [4, 5]]]}}',
        '{"version": 1, "models": {"a model": [["load", [], [1, 2, 3], [NaN, 5]]]}}',
        '{"version": 1, "models": {"a model": [["load", [], [1, 2, 3], [4, Infinity]]]}}',
        '{"version": 1, "models": {"a model": [["forward", [1, 2], [1, 2, 3], [4, 5]]]}}',
    ],
)
def test_a_file_that_is_none_is_as_good_as_no_file(text, tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(text)
    measurements = Measurements(file, "a model")
    measurements.read()
    assert measurements.is_empty
    measurements.add("forward", WAY, LOAD, Measurement(5000, 3.0))
    measurements.write()
    again = Measurements(file, "a model")
    again.read()
    assert list(again.rows()) == list(measurements.rows())


def test_a_place_that_cannot_be_written_is_no_matter(tmp_path):
    (tmp_path / "file").write_text("")
    measurements = Measurements(tmp_path / "file" / "measured.json", "a model")
    measurements.read()
    measurements.add("forward", WAY, LOAD, Measurement(5000, 3.0))
    measurements.write()
