"""Counts of what was noticed, and when losing content is the rule."""

import pytest

from mlx_edgelora.data import findings
from mlx_edgelora.data.findings import REASONING, TOOLS, UNANSWERED, Finding, Findings
from mlx_edgelora.errors import EdgeLoraError


def found(rows, losing, kind=REASONING):
    """So many rows that have some content, of which so many lose it."""
    counted = Findings()
    for number in range(rows):
        noticed = [Finding(kind, f"thought {number}")] * 2 if number < losing else []
        counted.add(f"train.jsonl: line {number + 1}", [kind], noticed)
    return counted


@pytest.mark.parametrize(("rows", "losing"), [(1, 1), (10, 1), (100, 10), (1000, 1000)])
def test_a_tenth_of_the_rows_that_have_it_is_the_rule(rows, losing):
    with pytest.raises(
        EdgeLoraError,
        match=rf"^data: {losing:,} of {rows:,} rows with reasoning in an answer lose it: .*"
        r"\(first: train\.jsonl: line 1, 'thought 0'\); use a model .* by --allow-lost-content$",
    ):
        found(rows, losing).refuse_lost("data")


@pytest.mark.parametrize(("rows", "losing"), [(0, 0), (11, 1), (5, 0), (101, 10)])
def test_fewer_rows_are_only_reported(rows, losing):
    counted = found(rows, losing)
    counted.refuse_lost("data")
    assert len(counted.lines()) == bool(losing)


def test_rows_without_such_content_do_not_count():
    counted = found(2, 2, TOOLS)
    for number in range(98):
        counted.add(f"other {number}", [], [])
    assert counted.rows == 100
    with pytest.raises(EdgeLoraError, match=r"^data: 2 of 2 rows with tool descriptions lose them"):
        counted.refuse_lost("data")


def test_what_is_no_loss_stops_nothing():
    counted = found(3, 3, UNANSWERED)
    counted.refuse_lost("data")
    assert counted.count(UNANSWERED) == 3 and counted.count(REASONING) == 0
    assert counted.lines() == [
        "3 rows with a last message that is no answer; it was left off (first: train.jsonl: "
        "line 1, 'thought 0')"
    ]


def test_losses_come_first_and_lines_can_be_few():
    counted = Findings()
    noticed = [findings.EARLIER, findings.EMPTY, findings.UNANSWERED, findings.TEXT]
    counted.add("here", [findings.TEXT], [Finding(kind) for kind in noticed])
    assert len(counted.lines()) == 4 and "lose text" in counted.lines()[0]
    few = counted.lines(3)
    assert len(few) == 3
    assert few[-1] == "2 more remarks: mlx-edgelora data shows them"


def test_long_texts_are_shown_in_part():
    counted = Findings()
    counted.add("here", [], [Finding(UNANSWERED, "word\n" * 100)])
    (line,) = counted.lines()
    assert len(line) < 140 and "word word" in line
