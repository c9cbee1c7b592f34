"""Files of `benchmarks/results/macs`: what machines measured, and the planner held to it."""

import copy
import json
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_edgelora.checkup.report import SCHEMA, SECTIONS, VERSION
from mlx_edgelora.planner.measured import LENGTHS, UNKNOWN
from mlx_edgelora.planner.needs import TERMS, need
from mlx_edgelora.planner.search import SLACK
from mlx_edgelora.planner.sizes import BatchShape, BlockBytes, ModelShape

FOLDER = Path(__file__).parent.parent / "benchmarks" / "results" / "macs"
FILES = sorted(FOLDER.glob("*.json"))
# Beside its blocks of scores MLX's gradient on Metal holds queries, keys, values, the output, and
# the gradients of all of these, some of them in float32: so many arrays of float32 at most. By
# reading MLX, not by measuring.
ARRAYS = 10
# How much more than the formula's a phase may take: the planner's margin, but of kept blocks what
# the formula misses (docs/planner.md); 1.45 on the Linux machine, where all tokens are labelled.
MARGINS = {"tail": 1.5}


def violations(report):
    """What of a report the planner's promises do not allow, in words."""
    found = {name: part["found"] for name, part in report["sections"].items()}
    lines = []
    for row in found["steps"].get("steps", []):
        if "error" in row:
            continue
        name, peak = row["name"], row["measured_bytes"]
        if peak > row["budget_bytes"]:
            lines.append(f"{name}: over its budget")
        if peak > row["needs_bytes"]:
            lines.append(f"{name}: more than it needs")
        # Of plenty nothing is measured before, and what is expected may be much too high.
        if name != "plenty" and row["expected_bytes"] > UNKNOWN * peak + SLACK:
            lines.append(f"{name}: much less than was expected")
        lines += [f"{name}: {text}" for text in _by_formula(row)]
    if found["device"].get("metal"):
        lines += _attention(found["attention"])
    return lines


def _by_formula(row):
    """Phases that took more than the formula and its margin say."""
    if {field.name for field in fields(ModelShape)} != row["shape"].keys():
        return  # written when a shape had other sizes
    blocks = tuple(BlockBytes(*sizes) for sizes in row["shape"]["by_block"])
    shape = ModelShape(**row["shape"] | {"by_block": blocks})
    for phase in row["phases"]:
        # Of embeddings, which are small beside the rest, the formula may miss nearly all.
        if phase["kind"] in TERMS.keys() - {"load"}:
            load, way = BatchShape(**phase["load"]), tuple(phase["way"])
            if len(way) != LENGTHS[phase["kind"]]:
                continue  # written when a phase had other settings
            margin = MARGINS.get(phase["kind"], UNKNOWN)
            if phase["bytes"] > margin * need(phase["kind"], shape, way, load) + SLACK:
                yield f"{phase['kind']} {way} needs more than the formula's"


def _attention(found):
    """Calls on Metal: the gradient holds three arrays of rows x heads x block x block."""
    rows, heads, tokens = found["rows"], found["heads"], found["tokens"]
    for call in found.get("calls", []):
        if "error" in call or not call["gradient"]:
            continue
        block = min(call["block"], tokens)
        scores = 3 * rows * heads * block**2 * found["itemsize"]
        arrays = ARRAYS * rows * heads * tokens * call["head_size"] * 4
        if not call["peak_bytes"] <= scores + arrays:
            yield f"heads of {call['head_size']}, block {call['block']}: more than the formula's"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_planner_keeps_its_promises(file):
    report = json.loads(file.read_text())
    assert (report["schema"], report["version"]) == (SCHEMA, VERSION)
    # Reports from before the section on caches have none.
    assert report["complete"] and set(report["sections"]) | {"caches"} == set(SECTIONS)
    assert violations(report) == []


def test_there_is_one_of_linux():
    report = json.loads((FOLDER / "linux-cpu.json").read_text())
    assert report["sections"]["versions"]["found"]["system"] == "Linux"
    assert not any(section["error"] for section in report["sections"].values())
    steps = report["sections"]["steps"]["found"]["steps"]
    assert [row["name"] for row in steps] == ["least", "twice", "plenty"]
    assert all(row["measured_bytes"] > 0 and row["phases"] for row in steps)


@pytest.fixture
def linux():
    return copy.deepcopy(json.loads((FOLDER / "linux-cpu.json").read_text()))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("budget_bytes", 10**6, "over its budget"),
        ("needs_bytes", 10**6, "more than it needs"),
        ("expected_bytes", 10**9, "much less than was expected"),
    ],
)
def test_a_broken_promise_is_found(linux, name, value, text):
    linux["sections"]["steps"]["found"]["steps"][0][name] = value
    assert violations(linux) == [f"least: {text}"]


def test_a_phase_beyond_the_formula_is_found(linux):
    step = linux["sections"]["steps"]["found"]["steps"][1]
    names = [field.name for field in fields(ModelShape)]
    step["shape"] = {name: step["shape"].get(name, 1) for name in names}
    linux["sections"]["steps"]["found"]["steps"] = [step]
    phase = next(row for row in step["phases"] if row["kind"] == "head")
    phase["bytes"] = 10**10
    assert [line for line in violations(linux) if "head" in line] == [
        f"twice: head {tuple(phase['way'])} needs more than the formula's"
    ]


def test_attention_on_metal_is_held_to_its_blocks(linux):
    def call(block, mib, gradient=True):
        return {"head_size": 64, "block": block, "gradient": gradient, "peak_bytes": mib * 2**20}

    linux["sections"]["device"]["found"]["metal"] = True
    linux["sections"]["attention"]["found"] = {
        **{"rows": 1, "heads": 8, "tokens": 2016, "itemsize": 2},
        # 48 MiB of scores and 39 of arrays; 3 and 39.
        "calls": [
            call(1024, 87),
            call(1024, 88),
            call(256, 42),
            call(256, 43),
            call(256, 99, False),
        ],
    }
    found = [line for line in violations(linux) if line.startswith("heads")]
    assert found == [
        "heads of 64, block 1024: more than the formula's",
        "heads of 64, block 256: more than the formula's",
    ]
