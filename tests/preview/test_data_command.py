"""`mlx-edgelora data`: what it shows, its exit status, and its page."""

import html.parser
import io
import re
import sys

import numpy as np
import pytest
from tiny import make_model, words, write_rows

from mlx_edgelora.data import Dataset, Row
from mlx_edgelora.preview import facts, terminal
from mlx_edgelora.preview.command import main
from mlx_edgelora.preview.facts import Segment
from mlx_edgelora.preview.page import page


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def shown(model, tmp_path, capsys):
    """shown(rows, *flags, valid=rows) -> exit status, standard output and error."""

    def call(rows, *flags, **splits):
        write_rows(tmp_path / "train.jsonl", rows)
        for split, more in splits.items():
            write_rows(tmp_path / f"{split}.jsonl", more)
        common = ["--model", model, "--data", tmp_path, "--batch-size", 1]
        status = main([str(flag) for flag in (*common, *flags)])
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def narrow(out):
    return all(len(line) <= 80 for line in out.splitlines())


def test_a_data_set_and_its_labels(shown):
    rows = [pair("w1 w2", "w3 w4"), pair("w5", "w6"), pair("w5", "w6")]
    status, out, err = shown(rows, "--train-on", "answers", valid=[pair("w5", "w6")] * 2)
    assert (status, err) == (0, "")
    assert "training: " in out and "validation: " in out
    assert "rows       3 read, 3 to train on" in out
    assert "tokens     20; 35 % of them labels (7)" in out
    assert "- training: 1 of 3 rows are the same as an earlier one" in out
    assert "- validation: 2 of 2 rows are in the training set as well" in out
    assert "<user> w1 w2 </s> <assistant>⟦w3 w4 </s>⟧" in out.replace("> ⟦", ">⟦")
    assert narrow(out)


def test_without_options_it_shows_the_data_of_the_package(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()).count("of them labels)") == 6 and "validation: " in out
    assert narrow(out)


def test_lost_content_is_shown_and_a_run_would_stop(shown):
    thought = {"role": "assistant", "content": "w2", "reasoning_content": "w3"}
    rows = [{"messages": [{"role": "user", "content": "w1"}, thought]}] * 2
    status, out, _ = shown(rows, "--mask-prompt")
    assert status == 1
    assert "a run would stop: " in " ".join(out.split())
    assert "--allow-lost-content" in out
    assert "⟦w2 </s>⟧" in out
    assert narrow(out)
    assert shown(rows, "--mask-prompt", "--allow-lost-content")[0] == 0


def test_what_is_cut_and_what_more_would_take(shown):
    rows = [pair("w1", words(range(40))), pair("w2", words(range(4)))]
    status, out, _ = shown(rows, "--max-seq-length", 17, "--train-on", "answers")
    assert status == 0
    text = " ".join(out.split())
    assert "1 longer than max_seq_length 17 (up to 45 tokens) and truncated, which cuts" in text
    assert re.search(
        r"--max-seq-length 65 cuts nothing and takes up to [\d.]+ .?B and \S+ \w+ a step, in place "
        r"of [\d.]+ .?B and",
        text,
    )


def test_bad_input_is_one_sentence(shown):
    assert shown([pair("w1", "w2")], "--rows", -1)[::2] == (
        2,
        "error: --rows: got -1, expected a number of at least 0\n",
    )
    status, _, err = shown([{"nothing": 1}])
    assert status == 2 and err.startswith("error: ")


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.marked, self.open, self.tags = "", False, set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open = self.open or tag == "mark"

    def handle_endtag(self, tag):
        self.open = self.open and tag != "mark"

    def handle_data(self, data):
        if self.open:
            self.marked += data


def test_the_page_is_escaped_and_needs_nothing_else(shown, tmp_path):
    status, _, _ = shown([pair("w1", "w2 w3")] * 2, "--html", tmp_path / "page.html", "--rows", 1)
    text = (tmp_path / "page.html").read_text()
    assert status == 0 and "http" not in text and "<script" not in text
    parsed = _Page()
    parsed.feed(text)
    assert parsed.marked.split()[:1] == ["<user>"] or "<user>" not in parsed.marked
    hostile = [
        ("</pre><script>x</script>", [Segment("<b>&", True, 2), Segment("</mark>", False, 1)])
    ]
    text = page([], ["<i>"], hostile)
    parsed = _Page()
    parsed.feed(text)
    assert parsed.marked == "<b>&"
    assert not parsed.tags & {"script", "b", "i"}


# --- parts ----------------------------------------------------------------------------------


def dataset(*rows, limit=1000):
    return Dataset((Row("line", n, *row) for n, row in enumerate(rows, 1)), limit, "rows")


def test_histograms_hold_every_row():
    for lengths in ([5], [2, 2, 3], list(range(2, 500)), [17, 18000]):
        bins = facts.histogram(np.array(lengths))
        assert sum(part.rows for part in bins) == len(lengths)
        assert len(bins) <= facts.BINS + 2
        for part in bins:
            assert part.rows == sum(part.first <= length <= part.last for length in lengths)


def test_duplicates_have_the_same_labels():
    rows = dataset(([1, 2, 3], 0), ([1, 2, 3], 0), ([1, 2, 3], 2), ([1, 2], 0))
    assert facts.duplicates(rows) == 1
    assert facts.shared(rows, dataset(([1, 2], 0), ([9, 9], 0))) == 1


def test_segments_are_the_row():
    class Letters:
        def decode(self, tokens):
            return "".join(chr(token) for token in tokens)

    tokens, spans = np.array([97, 98, 99, 100, 101]), np.array([[1, 2], [3, 5]])
    found = facts.segments(tokens, spans, Letters())
    assert found == [
        Segment("a", False, 1),
        Segment("b", True, 1),
        Segment("c", False, 1),
        Segment("de", True, 2),
    ]
    assert facts.segments(tokens, spans[:0], Letters()) == [Segment("abcde", False, 5)]


def test_colours_begin_anew_on_every_line_and_controls_are_written_out():
    parts = [Segment("ask\x1b[2J\u202e", False, 2), Segment("one\ntwo", True, 3)]
    lines = terminal.row("here", parts, None)
    assert lines == [
        "here (5 tokens, 3 of them labels)",
        "  ask\\x1b[2J\\u202e\x1b[32mone\x1b[0m",
        "  \x1b[32mtwo\x1b[0m",
    ]
    assert terminal.row("here", parts, ("⟦", "⟧"))[1:] == ["  ask\\x1b[2J\\u202e⟦one", "  two⟧"]


@pytest.mark.parametrize("character", ["x", "漢", "é", "\t", "\x07"])
def test_lines_fit_whatever_is_in_them(character):
    lines = terminal.row("here", [Segment(character * 390, True, 1)], ("⟦", "⟧"))
    assert max(sum(map(terminal._width, line)) for line in lines) <= 80
    long = terminal.row("here", [Segment("y" * 5000, False, 1)], None)
    assert "4,600 characters" in " ".join(long)


def test_colours_only_on_a_terminal_that_wants_them(shown, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    for no_color, encoding, expected in (
        ("", "utf-8", "\x1b[32m"),
        ("1", "utf-8", "⟦"),
        ("1", "ascii", ">>"),
    ):
        monkeypatch.setenv("NO_COLOR", no_color)
        stream = Terminal(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        shown([pair("w1", "w2")], "--train-on", "answers")
        stream.flush()
        assert expected in stream.buffer.getvalue().decode(encoding)
