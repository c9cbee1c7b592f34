"""What was measured is remembered, says how far formulas are off, and survives a broken file."""

import json

import pytest

from mlx_edgelora.planner.measured import KNOWN, LIKELY, MODELS, UNKNOWN, Estimate, Measured, Taken
from mlx_edgelora.planner.sizes import Load

LOAD, LONGER = Load(2, 100, 30), Load(2, 400, 120)
WAY, OTHER = (None, None, "fused", True, None), (512, None, "fused", True, None)


def formula(way, load):
    return 10.0 * load.size * (1 if way[0] is None else 0.5)


def test_what_was_measured_is_what_is_expected():
    known = Measured()
    assert known.bytes("forward", WAY, LOAD, formula) == Estimate(2000, UNKNOWN)
    assert known.seconds("forward", WAY, LOAD, formula) == 2000
    assert known.is_empty
    known.add("forward", WAY, LOAD, Taken(5000, 3.0))
    assert not known.is_empty and known.of("forward", WAY, LOAD) == Taken(5000, 3.0)
    assert known.bytes("forward", WAY, LOAD, formula) == Estimate(5000, KNOWN)
    assert known.seconds("forward", WAY, LOAD, formula) == 3.0
    assert known.bytes("backward", WAY, LOAD, formula) == Estimate(2000, UNKNOWN)


def test_what_is_like_it_says_how_far_the_formula_is_off():
    known = Measured()
    known.add("forward", WAY, LOAD, Taken(5000, 4000.0))
    assert known.bytes("forward", WAY, LONGER, formula) == Estimate(20000, LIKELY)
    assert known.seconds("forward", WAY, LONGER, formula) == 16000
    assert known.bytes("forward", OTHER, LOAD, formula) == Estimate(2500, LIKELY)
    # Of one way its own; of several loads the most bytes, and the least time.
    known.add("forward", OTHER, LOAD, Taken(1000, 1000.0))
    assert known.bytes("forward", OTHER, LONGER, formula).value == 4000
    known.add("forward", OTHER, Load(1, 100, 30), Taken(1500, 4000.0))
    assert known.bytes("forward", OTHER, LONGER, formula).value == 12000
    assert known.seconds("forward", OTHER, LONGER, formula) == 4000


def test_a_long_tail_is_told_by_two_short_ones():
    known = Measured()
    for kept, taken in ((1, Taken(100, 1.0)), (3, Taken(500, 2.0))):
        known.add("tail", (kept, 16, "fused"), LOAD, taken)
    assert known.of("tail", (3, 16, "fused"), LOAD) == Taken(500, 2.0)
    assert known.of("tail", (28, 16, "fused"), LOAD) == Taken(5500, 14.5)
    assert known.of("tail", (28, 40, "fused"), LOAD) is None
    assert known.of("tail", (28, 16, "fused"), LONGER) is None


def test_of_one_tail_another_takes_as_much_more_as_the_formula_says():
    known = Measured()
    known.add("tail", (1, 16, "fused"), LOAD, Taken(10**6, 1.0))
    told = known.bytes("tail", (28, 16, "fused"), LOAD, lambda way, load: 100 * way[0])
    assert told == Estimate(10**6 + 2700, LIKELY)


def test_it_is_kept_by_model(tmp_path):
    file = tmp_path / "new" / "measured.json"
    known = Measured(file, "a model")
    known.add("forward", WAY, LOAD, Taken(5000, 3.0))
    known.add("head", (16, "streamed"), LONGER, Taken(7, 0.5))
    known.write()
    again, another = Measured(file, "a model"), Measured(file, "another")
    again.read()
    another.read()
    assert list(again.rows()) == list(known.rows()) and another.is_empty
    for number in range(MODELS):
        more = Measured(file, f"model {number}")
        more.add("head", (16, "streamed"), LOAD, Taken(7, 0.5))
        more.write()
    assert len(json.loads(file.read_text())["models"]) == MODELS
    again = Measured(file, "a model")
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
    known = Measured(file, "a model")
    known.read()
    assert known.is_empty
    known.add("forward", WAY, LOAD, Taken(5000, 3.0))
    known.write()
    again = Measured(file, "a model")
    again.read()
    assert list(again.rows()) == list(known.rows())


def test_a_place_that_cannot_be_written_is_no_matter(tmp_path):
    (tmp_path / "file").write_text("")
    known = Measured(tmp_path / "file" / "measured.json", "a model")
    known.read()
    known.add("forward", WAY, LOAD, Taken(5000, 3.0))
    known.write()
