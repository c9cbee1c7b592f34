"""A plan as a record: checked, in words, to JSON and back."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.planner.plan import Plan

PLANS = st.builds(
    Plan,
    streamed_blocks=st.none() | st.integers(0, 99),
    head=st.sampled_from(["streamed", "resident"]),
    prefetch=st.booleans(),
    inputs=st.sampled_from(["file", "memory"]),
    adapters=st.sampled_from(["resident", "paged"]),
    tile_tokens=st.none() | st.integers(1, 9999),
    mlp_bytes=st.none() | st.integers(1, 2**30),
    loss_bytes=st.integers(1, 2**30),
    micro_batches=st.integers(1, 9),
    reason=st.text(),
)


@given(PLANS)
def test_json_and_back(plan):
    assert Plan.from_json(plan.json(), "here") == plan


@given(PLANS, st.integers(1, 80))
def test_every_plan_has_words(plan, blocks):
    assert all(plan.rows(blocks).values())


def edited(**changes):
    return json.dumps(json.loads(Plan().json()) | changes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "p.json: not a plan"),
        ("[]", "p.json: not a plan"),
        ("{}", "p.json: not a plan"),
        (edited(version=1), "p.json: not a plan"),
        (edited(weights="streamed"), "p.json: weights: unknown choice, expected some of streamed_"),
        (edited(head="disk"), 'p.json: head: got \'disk\', expected "streamed" or "resident"'),
        (edited(kept_blocks=-1), "p.json: kept_blocks: got -1, expected a whole number of at lea"),
        (edited(kept_blocks=None), "p.json: kept_blocks: got None, expected a whole number"),
        (edited(kept_blocks=True), "p.json: kept_blocks: got True, expected a whole number"),
        (edited(prefetch=1), "p.json: prefetch: got 1, expected true or false"),
        (edited(tile_tokens=0), "p.json: tile_tokens: got 0, expected null or a whole number of"),
        (edited(tile_tokens=2.5), "p.json: tile_tokens: got 2.5, expected null or a whole number"),
        (edited(micro_batches=0), "p.json: micro_batches: got 0, expected a whole number of at le"),
        (edited(inputs=2), 'p.json: inputs: got 2, expected "file" or "memory"'),
        (edited(halves=True), "p.json: halves: unknown choice, expected some of streamed_"),
        (edited(ram_blocks=2), "p.json: ram_blocks: unknown choice, expected some of streamed_"),
        (edited(kept_blocks=2, tile_tokens=8), "p.json: kept_blocks: got 2 with tile_tokens 8"),
    ],
)
def test_what_is_no_plan(text, sentence, tmp_path):
    with pytest.raises(EdgeLoraError) as caught:
        Plan.from_json(text, "p.json")
    assert str(caught.value).startswith(sentence)


def test_files_that_hold_none(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"nothing: cannot be read \(No such file"):
        Plan.read(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgeLoraError, match=r"bytes: cannot be read \(no text\)"):
        Plan.read(tmp_path / "bytes")


def test_words_say_how_many_blocks():
    rows = Plan(streamed_blocks=3, kept_blocks=2, micro_batches=2).rows(10)
    assert rows["weights"] == "3 of 10 blocks from disk, 7 in memory, the next block read ahead"
    assert rows["activations"] == "8 of 10 blocks recomputed, 2 kept"
    assert rows["inputs of blocks"] == "in a file"
    assert rows["batch"] == "in 2 parts"


def test_words_say_where_inputs_wait():
    for plan in (Plan(inputs="memory"), Plan(kept_blocks=9)):  # of kept blocks none waits
        assert plan.rows(9)["inputs of blocks"] == "in memory"
    assert Plan(kept_blocks=8).rows(9)["inputs of blocks"] == "in a file"


def test_words_say_how_many_keys_have_their_gradients_summed():
    plan = Plan(tile_tokens=128, key_tokens=2048)
    assert plan.rows(9)["gradients of keys"] == "2048 tokens at a time"
    assert "gradients of keys" not in replace(plan, inputs="memory").rows(9)  # those of all
    assert "gradients of keys" not in Plan().rows(9)
