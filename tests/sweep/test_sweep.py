"""Every architecture of mlx-lm is trained exactly or refused, and the sweep would see it if not."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from report import cell
from sweeping import (
    EXCUSED,
    RUNS,
    Outcome,
    Reference,
    Result,
    configurations,
    examine,
    sweep,
    tiled_blocks,
    uncompiled,
)

from mlx_edgelora import EdgeLoraError
from mlx_edgelora.blocks import tracing
from mlx_edgelora.engine.step import Engine

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CONFIGS = configurations()
COMPUTED = [run for run in RUNS if run != "plan"]


@pytest.fixture(scope="module")
def results(request) -> dict[str, Result]:
    """Those of all tests that were selected, each of which has a configuration."""
    functions = (getattr(item, "callspec", None) for item in request.session.items)
    names = {spec.params["name"] for spec in functions if spec and "name" in spec.params}
    return {r.name: r for r in sweep({n: c for n, c in CONFIGS.items() if n in names})}


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_exactly_or_refused(name, results):
    result = results[name]
    if problems := result.problems():
        pytest.fail("\n".join(problems), pytrace=False)
    if not result.missing:
        assert set(result.runs) == set(RUNS)
        return
    assert name in EXCUSED, f"{name}: {result.missing}"
    pytest.skip(EXCUSED[name])


def documented() -> dict[str, list[str]]:
    """What `docs/architectures.md` says of each run: a word, without its figure."""
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    rows = [line.split(" | ") for line in page.partition("## All of them")[2].splitlines()]
    rows = [row for row in rows if len(row) > len(RUNS)][1:]
    return {row[0].removeprefix("| "): list(map(word, row[1 : 1 + len(RUNS)])) for row in rows}


def word(cell: str) -> str:
    return cell.replace("*", "").partition(" ")[0]


def test_the_docs_say_what_is_found(results):
    """Figures differ from machine to machine."""
    said = documented()
    assert set(CONFIGS) <= set(said)
    found = {n: [word(cell(r.runs.get(run))) for run in RUNS] for n, r in results.items()}
    assert found == {name: said[name] for name in found}


def architectures() -> Iterator[str]:
    """Of the mlx-lm that is installed, without importing any."""
    for path in Path(mlx_lm.models.__path__[0]).glob("*.py"):
        names = set()
        for node in ast.parse(path.read_text()).body:
            names |= {getattr(node, "name", None)}
            names |= {a.asname or a.name for a in node.names} if hasattr(node, "names") else set()
        if {"Model", "ModelArgs"} <= names:
            yield path.stem


def test_no_architecture_is_left_out():
    known = {name.partition(":")[0] for name in CONFIGS} | set(EXCUSED)
    assert not sorted(set(architectures()) - known), "configs.json has none for these"
    assert not sorted(known - set(architectures())), "mlx-lm has no such architecture"


# ---- the sweep itself


def off(factor):
    """Engine.value_and_grad with one of its arrays multiplied."""
    right = Engine.value_and_grad

    def wrong(self, batch):
        loss, gradients = right(self, batch)
        arrays = dict(tree_flatten(gradients))
        name = sorted(arrays)[-1]
        return loss, tree_unflatten(list((arrays | {name: factor * arrays[name]}).items()))

    return wrong


@pytest.fixture
def llama(monkeypatch):
    """llama(function) -> the result where the engine's gradients are the function's."""

    def run(function=None, runs=COMPUTED):
        with monkeypatch.context() as patch:
            if function is not None:
                patch.setattr(Engine, "value_and_grad", function)
            return examine("llama", CONFIGS["llama"], runs)

    return run


def raising(error):
    def run(self, batch):
        raise error

    return run


@pytest.mark.parametrize("factor", [1.01, 1.0001, 0.0, float("nan")])
def test_a_gradient_that_is_off_is_wrong(llama, factor):
    result = llama(off(factor), ["whole", "kept", "drop-in"])
    assert {run: o.state for run, o in result.runs.items()} == {
        "whole": "wrong",
        "kept": "wrong",
        "drop-in": "exact",
        "plan": "answered",
    }
    assert len(result.problems()) == 2
    assert "llama: whole is wrong: 1 of 43 arrays are off" in result.problems()


def test_an_engine_that_is_right_has_no_problems(llama):
    result = llama()
    assert result.problems() == [] and result.tiled == result.blocks == 3
    assert {result.runs[run].state for run in COMPUTED} == {"exact"}
    assert max(result.runs[run].error for run in COMPUTED) > 0  # something was compared


def test_a_run_that_raises_has_crashed(llama):
    result = llama(raising(ZeroDivisionError("by nothing")), ["whole", "drop-in"])
    assert result.runs["whole"].state == "crashed"
    assert "ZeroDivisionError: by nothing (test_sweep.py:" in result.problems()[0]


def test_a_refusal_by_some_runs_alone_is_a_problem(llama):
    result = llama(raising(EdgeLoraError("not this one")), ["whole", "kept", "drop-in"])
    assert result.problems() == [
        "llama: whole, kept refused, but not drop-in, plan: not this one",
    ]


def test_all_have_to_refuse_for_one_reason():
    refused = {run: Outcome("refused", "no") for run in RUNS}
    assert Result("a", refused).problems() == []
    assert Result("a", refused | {"plan": Outcome("refused", "never")}).problems() != []


def test_beyond_the_bound_only_what_float32_leaves_open_is_exact():
    reference = Reference.__new__(Reference)
    reference.loss, reference.gradients = 1.0, {"a": mx.array([3.0, 4.0]), "b": mx.zeros(2)}
    reference.sizes = {"a": 5.0, "b": 0.0}

    def state(moved, factor, moves):
        reference._moves = lambda: {"a": 5.0 * moves, "b": 1.0}
        got = {"a": factor * reference.gradients["a"], "b": mx.array([moved, 0.0])}
        return reference.compare(mx.array(1.0), got).state

    assert state(0.0, 1 + 8e-6, 0.0) == "exact"
    assert state(0.0, 1 + 3e-5, 2e-6) == "wrong"
    assert state(0.0, 1 + 3e-5, 4e-6) == "exact"
    assert state(0.0, 1.02, 1.0) == "wrong"
    assert state(1e-3, 1.0, 1.0) == "wrong"
    assert reference.compare(mx.array(1.1), reference.gradients).where == "loss"
    assert reference.compare(mx.array(1.0), {"a": mx.zeros(2)}).state == "wrong"


def test_blocks_that_look_at_values_are_known_without_compiling():
    x = mx.zeros(2)
    with uncompiled():
        assert not tracing.depends_on_values(lambda x: [x + 1], [x])
        assert tracing.depends_on_values(lambda x: [x * x.sum().item()], [x])


def test_what_a_run_tells_of_its_tiles():
    logged = ["loss over something", "tiles: 8 tokens at a time in 2 of 4 blocks (some\n reason)"]
    assert tiled_blocks(logged) == (2, "some reason")
    assert tiled_blocks(["tiles: 8 tokens at a time in 4 of 4 blocks"]) == (4, "")
    assert tiled_blocks([]) == (None, "")


def dies_of_llama(name, config) -> Result:
    if name == "llama":
        os._exit(11)
    return Result(name, {"whole": Outcome("exact")})


def test_a_process_that_dies_takes_no_other_result_with_it():
    found = {r.name: r for r in sweep({"llama": {}, "qwen3": {}}, 1, dies_of_llama)}
    assert found["qwen3"].runs and not found["qwen3"].problems()
    assert found["llama"].problems() == ["llama: its process ended without a word"]
