"""Lines of a terminal."""

from mlx_edgelora.measure.text import named_rows, say, wrapped

LONG = "warning: " + "some words of a sentence " * 6


def test_long_lines_are_broken_between_words():
    lines = wrapped(f"short\n{LONG}\n  {LONG}").splitlines()
    assert lines[0] == "short" and max(map(len, lines)) <= 80
    assert lines[1].startswith("warning: some") and lines[2].startswith("  ")
    assert [line[:4] for line in lines if "warning" in line] == ["warn", "  wa"]
    assert " ".join(" ".join(lines[1:]).split()) == " ".join(f"{LONG} {LONG}".split())


def test_what_fits_is_left_as_it_is():
    table = "a        b  \n  1   2\n\n"
    assert wrapped(table) == table.rstrip("\n") + "\n"


def test_a_path_is_never_broken():
    path = "/a-folder/" * 12
    assert path in wrapped(f"the adapter is in {path}").splitlines()[-1]


def test_names_and_what_belongs_to_them():
    lines = named_rows({"plan": LONG, "x": "y"}, 10, indent=2)
    assert lines[1] == "  x         y"
    assert lines[0].startswith("  plan      warning")
    first, *rest = lines[0].splitlines()
    assert rest and all(
        line.startswith(" " * 12) and len(line) <= 80 for line in [first, *rest][1:]
    )


def test_what_is_said_is_printed(capsys):
    say(LONG)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
