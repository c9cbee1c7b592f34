"""A GPU never waits for a disk: no file is read by the graphs that a step evaluates."""

import io
from contextlib import closing

import mlx.core as mx
import pytest
from harness import engine, random_batch, save
from mlx.utils import tree_flatten

from mlx_edgelora.model.weights import StreamedWeights

CASES = {
    "whole": {},
    "tiles": {"tile_tokens": 10},
    "cast": {"dtype": "float16"},
    "resident": {"streamed": False},
    "some in memory": {"streamed_blocks": 1},
    "tail": {"kept_blocks": 2, "head": "resident"},
    "kept": {"kept_blocks": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "llama", quantized=True)


@pytest.fixture
def loads(monkeypatch):
    """How many arrays of files each evaluation has in its graph."""
    found = []

    def spied(name):
        original = getattr(mx, name)

        def call(*trees):
            arrays = [a for _, a in tree_flatten(list(trees)) if isinstance(a, mx.array)]
            text = io.StringIO()
            mx.export_to_dot(text, *arrays)
            found.append(text.getvalue().count('label ="Load"'))
            return original(*trees)

        monkeypatch.setattr(mx, name, call)

    spied("eval")
    spied("async_eval")
    return found


@pytest.mark.parametrize("ahead", [False, True], ids=["in order", "ahead"])
@pytest.mark.parametrize("case", CASES)
def test_operands_are_there_before_the_graph(folder, loads, case, ahead):
    with closing(engine(folder, **CASES[case])) as ours:
        ours.walk.ahead = ahead
        loads.clear()
        ours.value_and_grad(random_batch(2, 17, share=0.4))
        ours.loss(random_batch(2, 17))
    assert len(loads) > 6
    if (
        case == "kept"
    ):  # each waits for one `DeferredArray`, an array of a file whose pages are in memory
        assert sum(loads) >= 2 and max(loads) == 1
    else:
        assert not any(loads)


def test_a_weight_that_is_still_in_its_file_is_seen(folder, loads, monkeypatch):
    taken = StreamedWeights._read_block

    def lazy(source, index, ready, own_memory):
        arrays = taken(source, index, ready, own_memory)
        shard, _ = next(iter(source._blocks[0].values()))
        file = mx.load(str(shard))
        names = {name: f"model.layers.{index}.{name.replace('.linear.', '.')}" for name in arrays}
        return {name: file[own] for name, own in names.items()}

    monkeypatch.setattr(StreamedWeights, "_read_block", lazy)
    with closing(engine(folder)) as ours:
        loads.clear()
        ours.value_and_grad(random_batch(2, 17))
    assert max(loads) > 10
