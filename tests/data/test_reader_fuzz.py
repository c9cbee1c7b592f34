"""Random bytes and damaged files through every reader: rows, or a sentence."""

import gzip
import json

import numpy as np
import pytest

from mlx_edgelora.data.conversation import RowError
from mlx_edgelora.data.row_kinds import find_kind
from mlx_edgelora.data.sources import file_source
from mlx_edgelora.errors import EdgeLoraError

ROWS = [
    {"messages": [{"role": "user", "content": "qü"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "b", "name": "n"}], "tools": []},
]
GOOD = {
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    ".json": json.dumps({"data": ROWS}, ensure_ascii=False, indent=1),
    ".csv": 'text,note\n"a, ü",b\n"c\nd",\n',
    ".tsv": "prompt\tcompletion\na\tb\n",
    ".txt": "one\ntwo ü\n",
}
PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\\ud800",
    b"9" * 99,
]


def damaged(random, content):
    """The bytes with a few of them cut, replaced, doubled or put in."""
    for _ in range(random.integers(1, 4)):
        at, to = sorted(random.integers(0, len(content) + 1, 2).tolist())
        to = min(to, at + 20)
        kind = random.integers(4)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + bytes(random.integers(0, 256, to - at).tolist()) + content[to:]
        elif kind == 2:
            content = content[:to] + content[at:]
        else:
            content = content[:at] + PIECES[random.integers(len(PIECES))] + content[at:]
    return content


def read(path):
    """The number of rows in a file, after each has been put into its canonical form."""
    rows = [row for _, row in file_source(path).rows]
    if rows:
        kind = find_kind(rows)
        for row in rows:
            kind.read(row)
    return len(rows)


def outcomes(path, random, content, count):
    """How many of so many damaged files were read and how many refused."""
    found = {"read": 0, "refused": 0}
    for _ in range(count):
        path.write_bytes(damaged(random, content))
        try:
            read(path)
            found["read"] += 1
        except (EdgeLoraError, RowError):
            found["refused"] += 1
    return found


@pytest.mark.parametrize("suffix", GOOD)
def test_damaged_files_are_read_or_refused(tmp_path, suffix):
    random = np.random.default_rng(7)
    content = GOOD[suffix].encode()
    found = outcomes(tmp_path / f"a{suffix}", random, content, 150)
    assert found["refused"] > 10
    assert found["read"] > (0 if suffix.startswith(".json") else 10)
    found = outcomes(tmp_path / f"a{suffix}.gz", random, gzip.compress(content), 50)
    assert found["refused"] > 10


def test_damaged_parquet_is_read_or_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 20), path)
    found = outcomes(path, np.random.default_rng(7), path.read_bytes(), 100)
    assert found["refused"] > 10
