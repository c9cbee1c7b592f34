"""The page: well-formed, of what the log holds, and text from a log stays text."""

import re
from html.parser import HTMLParser

import pytest
from logs import (
    ANSWERS,
    END,
    lines_of,
    loss_record,
    plan_record,
    run_record,
    step_record,
    whole_log,
)

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.report.charts import Line, curves
from mlx_edgelora.report.page import check_target, page, write_report
from mlx_edgelora.report.run import read_run

VOID = {"meta", "link", "br"}
# Attributes through which a page could load or run something.
LOADING = {"src", "href", "srcset", "action", "data", "xlink:href", "poster", "formaction"}


class Tree(HTMLParser):
    """Checks that elements are closed in order; keeps them and their texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], {}, []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def drawn(records):
    text = page(read_run(lines_of(records), "run.jsonl"))
    return text, Tree(text)


def test_a_whole_run():
    text, tree = drawn(whole_log())
    assert tree.texts["h1"] == ["Llama-3.2-3B-Instruct-4bit"]
    assert tree.texts["h2"] == [
        "Run",
        "Loss",
        "Tokens per second",
        "Memory",
        "Memory of one step, by phase and block",
        "Plan",
        "An answer before and after training",
    ]
    for words in (
        "finished, step 100 of 100",
        "trainable 0.38 %",
        "MLX budget 4 GB",
        "2.48 s a step",
        "Expected: 3.70 GB and 2.5 s a step.",
        "computed again",
        "0% before, 95% after",
        "2026-11-27 02:30",
    ):
        assert words in text
    paths = [attrs for attrs in tree.of("path") if attrs["class"].startswith(("line", "bars"))]
    assert len(paths) == 5 + 6  # two losses, speed, two of memory; phases
    assert any(attrs["name"] == "viewport" for attrs in tree.of("meta") if "name" in attrs)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub("<style>.*?</style>", "", text, flags=re.S))


def test_a_run_that_compares_answers():
    """Accuracy and margin have charts and tiles, those of validations apart."""
    trained = [loss_record(s, reward_margin=s / 10, accuracy=s / 40) for s in (10, 20, 40)]
    validated = loss_record(39, "val_loss", reward_margin=-0.5, accuracy=0.25)
    text, tree = drawn([run_record(), *trained[:2], validated, trained[2]])
    assert tree.texts["h2"][:4] == ["Run", "Loss", "Accuracy of comparisons", "Reward margin"]
    assert "training: 25% at step 10, 100% at step 40; validation: 25% at step 39" in text
    assert "training: 1 at step 10, 4 at step 40; validation: -0.5 at step 39" in text
    tiles = dict(zip(tree.texts["h3"], tree.texts["strong"], strict=True))
    assert (tiles["Accuracy"], tiles["Validation accuracy"]) == ("100.0%", "25.0%")


def test_nothing_comes_from_outside():
    text, tree = drawn(whole_log())
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert not any(LOADING & attrs.keys() for _, attrs in tree.elements)
    (policy,) = (a["content"] for a in tree.of("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy
    assert len(tree.of("script")) == 1 and tree.of("script") == [{}]


ATTACK = """"'><script>alert(1)</script></style></title><img src=x onerror=alert(1)>&lt;{}{0}"""


def poisoned(value):
    """Every text, and every key that is shown, becomes the attack."""
    if isinstance(value, dict):
        return {
            ATTACK if key in ("weights", "data", "forward") else key: poisoned(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return list(map(poisoned, value))
    return ATTACK if isinstance(value, str) else value


def test_text_from_a_log_stays_text():
    for records in (whole_log(), whole_log()[:-4]):  # also without step_memory
        text, tree = drawn(list(map(poisoned, records)))
        _, clean = drawn(records)
        assert sorted({tag for tag, _ in tree.elements}) == sorted({t for t, _ in clean.elements})
        assert not any(name.startswith("on") for _, attrs in tree.elements for name in attrs)
        assert len(tree.of("script")) == 1
        assert "&lt;script&gt;alert(1)" in text
        assert any(ATTACK in words for words in tree.texts["dd"])


NONSENSE = [None, 5, -1e29, "text", [], [1], {}, {"a": []}, True, [[]], [{"phase": None}]]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
def test_records_of_anything(nonsense):
    """A damaged log gives a page of what is there."""
    for record in (run_record(), plan_record(), step_record(), ANSWERS, END):
        (kind,) = record
        drawn([loss_record(5), {kind: nonsense}, loss_record(10)])
        if isinstance(record[kind], dict):
            for key in record[kind]:
                drawn([loss_record(5), {kind: record[kind] | {key: nonsense}}])
    for key in loss_record(5):
        if key != "iteration":
            drawn([run_record(), loss_record(5) | {key: nonsense}, loss_record(10)])


def test_a_run_that_was_killed():
    text, _ = drawn([run_record(), plan_record(), loss_record(5)])
    assert "no end in the log; last report at step 5 of 100" in text
    assert "as expected" in text  # by the planner, where no step was measured


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"status": "interrupted"}, "interrupted after step 5 of 100"),
        ({"status": "failed", "reason": "loss is <nan>"}, "loss is &lt;nan&gt;"),
    ],
)
def test_a_run_that_did_not_finish(end, words):
    text, _ = drawn([run_record(), loss_record(5), {"end": end}])
    assert words in text


def test_one_point_is_a_dot():
    text, tree = drawn([loss_record(5)])
    assert all("dots" in a["class"] for a in tree.of("path") if a["class"] not in ("grid", "bars"))
    assert 'class="dots c0" d="M0 ' in text


@pytest.mark.parametrize(
    "values",
    [[0], [5, 5], [1e-300, 2e-300], [1e29, -1e29], [1, 1 + 1e-15], [0, 1e-12], [-3, -2], [3e9]],
    ids=str,
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_axes_hold_every_value(values, from_zero):
    text = curves("T", [Line("l", "c0", list(enumerate(values)))], str, from_zero)
    paths = "".join(re.findall(r' d="([^"]*)"', text))
    places = [float(n) for n in re.findall(r"-?[\d.]+(?:e[-+]\d+)?", paths)]
    assert places and all(-1e-6 <= place <= 1000 for place in places)
    assert 2 <= text.count('style="bottom:') <= 8
    assert not from_zero or re.search(r">-?0\.0<", text)


def test_a_budget_far_above_is_named_but_not_drawn():
    limit = ("budget", 1e12)
    text = curves("T", [Line("l", "c0", [(0, 1), (1, 2)])], str, limit=limit)
    assert "budget, above this chart" in text and 'path class="limit"' not in text
    text = curves("T", [Line("l", "c0", [(0, 1), (1, 2)])], str, limit=("budget", 3))
    assert 'path class="limit"' in text


def test_a_step_of_many_blocks_stays_small():
    text, _ = drawn([loss_record(5), step_record(blocks=2000)])
    assert len(text) < 100_000


def test_a_report_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "run.html"
    target.write_text("old")
    with pytest.raises(EdgeLoraError, match="log: an empty file"):
        write_report([], "log", target)
    assert target.read_text() == "old"
    write_report(lines_of(whole_log()), "log", target)
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [target]


def test_targets_that_cannot_be(tmp_path):
    with pytest.raises(EdgeLoraError, match="is a folder, expected the report's file"):
        check_target(tmp_path)
    with pytest.raises(EdgeLoraError, match="none is not a folder; choose a file"):
        check_target(tmp_path / "none" / "run.html")


def test_a_process_far_above_is_named_but_not_drawn():
    """The interpreter alone takes many times what a tiny model does."""
    text, tree = drawn([loss_record(step, footprint_bytes=10**11) for step in (5, 10)])
    assert "whole process 100 GB, above this chart" in text
    assert len([a for a in tree.of("path") if a["class"] == "line c2"]) == 0
