"""Readers of files: the same rows from every kind of file, and a sentence for every bad one."""

import gzip
import json
import sys
import tracemalloc

import pytest

from mlx_edgelora.data import json_files, lines, tables
from mlx_edgelora.data.sources import data_suffix, file_source
from mlx_edgelora.errors import EdgeLoraError

ROWS = [{"prompt": 'Grüße, "Welt"', "completion": "line\nbreak"}, {"prompt": "", "completion": "b"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,completion\n"Grüße, ""Welt""","line\nbreak"\n,b\n'
FILES = {
    "a.jsonl": JSONL,
    "bom.jsonl": "\ufeff" + JSONL,
    "crlf.ndjson": JSONL.replace("\n", "\r\n"),
    "blank.jsonl": "\n" + JSONL.replace("\n", "\n \n"),
    "unended.jsonl": JSONL[:-1],
    "lines.json": JSONL,
    "list.json": json.dumps(ROWS),
    "list.jsonl": json.dumps(ROWS),
    "pretty.json": "\ufeff" + json.dumps(ROWS, indent=2),
    "pretty-list.jsonl": json.dumps(ROWS, indent=2),
    "object.json": json.dumps({"version": 1, "tags": ["a"], "data": ROWS, "note": {"b": []}}),
    "pretty-object.json": json.dumps({"data": ROWS}, indent=1),
    "concatenated.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "UPPER.JSONL": JSONL,
    "a.csv": CSV,
    "bom.csv": "\ufeff" + CSV,
    "crlf.csv": CSV.replace("\n", "\r\n").replace("line\r\nbreak", "line\nbreak"),
    "blank.csv": "\n" + CSV.replace("\n,b", "\n\n , \n,b"),
    "unnamed.csv": ',prompt,completion\n0,"Grüße, ""Welt""","line\nbreak"\n1,,b\n',
    "semicolons.csv": 'prompt;completion\n"Grüße, ""Welt""";"line\nbreak"\n;b\n',
    "tabs.csv": 'prompt\tcompletion\n"Grüße, ""Welt"""\t"line\nbreak"\n\tb\n',
    "a.tsv": 'prompt\tcompletion\n"Grüße, ""Welt"""\t"line\nbreak"\n\tb\n',
}


def write(tmp_path, name, content):
    path = tmp_path / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def rows_of(path):
    return [dict(row) for _, row in file_source(path).rows]


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name):
    assert rows_of(write(tmp_path, name, FILES[name])) == ROWS
    packed = write(tmp_path, f"{name}.gz", FILES[name])
    assert rows_of(packed) == ROWS
    source = file_source(packed)
    assert list(source.rows) == list(source.rows)  # as often as they are wanted


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", FILES["blank.jsonl"], ["line 2", "line 4"]),
        ("a.json", FILES["pretty.json"], ["row 1", "row 2"]),
        ("a.csv", CSV, ["line 2", "line 4"]),
        ("a.csv", FILES["blank.csv"], ["line 3", "line 7"]),
        ("a.txt", "one\n\ntwo\n", ["line 1", "line 3"]),
    ],
)
def test_places_of_rows(tmp_path, name, content, places):
    source = file_source(write(tmp_path, name, content))
    found = [f"{source.row_name} {number}" for number, _ in source.rows]
    assert found == [f"{tmp_path / name}: {place}" for place in places]


def test_a_text_file_is_a_row_a_line(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone, \u2028 two\r\n\n   \n  three")
    assert rows_of(path) == [{"text": "one, \u2028 two"}, {"text": "  three"}]
    assert file_source(path).is_text


def test_a_message_list_in_a_single_object_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}]}
    for content in (json.dumps(row), json.dumps(row, indent=2)):
        assert rows_of(write(tmp_path, "a.json", content)) == [row]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_documents_are_read_piece_by_piece(tmp_path, monkeypatch, chunk):
    rows = [{"text": "é" * n, "n": [n, -1.5e3, True, None, '\\"\u00fc']} for n in range(20)]
    path = write(tmp_path, "a.json", json.dumps({"a": 12, "rows": rows}, ensure_ascii=False))
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    source = file_source(path)
    assert [row for _, row in source.rows] == rows


def test_a_long_list_costs_no_more_memory_than_a_piece_of_it(tmp_path):
    row = json.dumps({"text": "a" * 1000})
    path = write(tmp_path, "a.json", "[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in file_source(path).rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000 and path.stat().st_size > 20e6
    assert peak < 8e6


BAD = [
    (
        "a.jsonl",
        '{"a": 1}\n{"a": 1',
        r"line 2: is not JSON \(.* at column 8\), expected one object",
    ),
    (
        "a.jsonl",
        '{"a": 1, "a": 2}',
        r"line 1: has the key 'a' twice; keep one of them",
    ),
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"line 1: is not JSON \(Exceeds"),
    ("a.jsonl", '{"a": "\\ud800"}', r"line 1: holds half of a surrogate pair"),
    ("a.jsonl", '{"a": ' * 10**6, r"line 1: is nested too deeply"),
    ("a.jsonl", b'{"a": "\xe9"}', r"line 1: is not UTF-8 text \(byte 0xe9, as in Latin-1"),
    (
        "a.jsonl",
        '{"a": 1}'.encode("utf-16"),
        r"line 1: is not UTF-8 text \(it begins like UTF-16\)",
    ),
    (
        "a.json",
        '[{"a": 1},\n{"a": 1',
        r"line 2: is not JSON \(Expecting ',' delimiter\); correct it",
    ),
    ("a.json", '[{"a": 1}\n{"a": 1}]', r"line 2: is not JSON \(got '{', expected ',' or '\]'\)"),
    ("a.json", '[{"a": 1},\n]', r"line 2: is not JSON \(Expecting value\)"),
    ("a.json", '[{"a": 1}', r"line 1: is not JSON \(got the end of the file, expected"),
    ("a.json", '[{"a": 1}]\n[]', r"line 2: got '\[' after its list of rows, expected nothing more"),
    ("a.json", '[{"a": 1}, 7]', r"row 2: got a JSON int, expected an object such as"),
    ("a.json", '[{"a": "\\ud800"}]', r"row 1: holds half of a surrogate pair"),
    ("a.json", '{"a":\n[{"b": 1}], "c":\n[{"d": 1}]}', r"line 3: holds two lists of rows, 'a' and"),
    ("a.json", '{"a":\n[{"b": 1}]}\n{', r"line 3: got '{' after the object around its rows"),
    ("a.json", '{"a":\n[{"b": 1}], 3: 4}', r"line 2: is not JSON \(got 3, expected a key in quo"),
    ("a.json", "[" * 10**6, r"line 1: is nested too deeply"),
    ("a.json", '[\n{"a": "\n"}]', r"line 2: is not JSON \(Invalid control character"),
    ("a.json", b'[\n{"a": "\xff"}]', r"line 2: is not UTF-8 text"),
    ("a.json", "7", r"line 1: got a JSON int, expected an object"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", r"line 3: has 3 cells, expected 2 as in the header"),
    ("a.csv", "a,b\n1\n", r"line 2: has 1 cells, expected 2 as in the header"),
    ("a.csv", "a,a\n1,2\n", r"line 1: the column 'a' is there twice"),
    ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', r"line 3: is not CSV \(unexpected end of data\)"),
    ("a.csv", 'a,b\n"1"x,2\n', r"line 2: is not CSV \(',' expected after '\"'\)"),
    ("a.csv", b"a,b\n\n1,\xe9\n", r"line 3: is not UTF-8 text"),
    ("a.csv", "a,b\r1,2\r3,4", r"line 1: is not CSV \(new-line character seen"),
    ("a.txt", b"one\n\xfc\n", r"line 2: is not UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, sentence):
    path = write(tmp_path, name, content)
    with pytest.raises(EdgeLoraError, match=f"^{path}: {sentence}"):
        rows_of(path)


def test_damaged_compression_is_named(tmp_path):
    packed = gzip.compress(JSONL.encode() * 50)
    for content in (packed[:-20], b"no gzip", packed[:40] + b"\xff\xff" + packed[42:]):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(EdgeLoraError, match=r"a\.jsonl\.gz: (cannot be uncompressed|line \d)"):
            rows_of(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_row_of_absurd_size_is_refused(tmp_path, monkeypatch, name):
    for module in (lines, json_files, tables):
        monkeypatch.setattr(module, "ROW_LIMIT", 1000)
    monkeypatch.setattr(json_files, "CHUNK", 100)
    content = {
        "a.jsonl": '{"text": "' + "a" * 2000 + '"}',
        "a.json": '[{"text": "' + "a" * 2000 + '"}]',
        "a.csv": 'text\n"' + "a\n" * 700 + '"\n',
        "a.txt": "a" * 2000,
    }[name]
    path = write(tmp_path, name, content)
    if name == "a.csv":  # of many short lines: the csv module's own limit is far above this one
        assert rows_of(path)
        return
    with pytest.raises(EdgeLoraError, match=r"is longer than 100 MB, the limit of a row"):
        rows_of(path)


def test_a_cell_may_be_long(tmp_path):
    assert rows_of(write(tmp_path, "a.csv", "text\n" + "a" * 200_000)) == [{"text": "a" * 200_000}]


def test_names_of_files(tmp_path):
    assert data_suffix(tmp_path / "a.b.JSONL.gz") == ".jsonl"
    assert data_suffix(tmp_path / "a.parquet.gz") is data_suffix(tmp_path / "a.md") is None
    with pytest.raises(EdgeLoraError, match=r"a\.xlsx: its name says no kind .* \.jsonl, \.ndjson"):
        file_source(tmp_path / "a.xlsx")
    with pytest.raises(EdgeLoraError, match=r"a\.json: cannot be read \(No such file"):
        file_source(tmp_path / "a.json")
    assert rows_of(write(tmp_path, "empty.csv", "")) == rows_of(write(tmp_path, "e.json", "")) == []


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    call = {"name": "f", "arguments": {"x": "1"}}
    other = {"name": "g", "arguments": {"y": "2"}}
    rows = [{"messages": [{"role": "assistant", "calls": [c]}], "text": "a"} for c in (call, other)]
    rows.append({"messages": None, "text": "b"})
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows * 200), path)
    # Columns of other rows are nulls in the file, and no keys here.
    rows[2] = {"text": "b"}
    assert rows_of(path) == rows * 200
    assert [number for number, _ in file_source(path).rows] == list(range(1, 601))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(EdgeLoraError, match=r"a\.parquet: row 1: cannot be read as Parquet"):
        rows_of(path)


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EdgeLoraError, match=r"a\.parquet: Parquet is read by the package pyarrow"):
        rows_of(tmp_path / "a.parquet")


def test_nulls_go_at_every_depth():
    value = {"a": None, "b": [{"c": None, "d": [None]}, {"e": {"f": None}}]}
    assert tables.without_nulls(value) == {"b": [{"d": [None]}, {"e": {}}]}
