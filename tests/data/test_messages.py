"""Messages as other tools write them."""

import json

import pytest

from mlx_edgelora.data.conversation import REASONING_KEYS, RowError
from mlx_edgelora.data.messages import read_messages

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(**message):
    return read_messages("messages", [message])[0]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("user", "user"),
        ("User", "user"),
        ("human", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("ASSISTANT", "assistant"),
        ("system", "system"),
        ("developer", "developer"),
        ("tool", "tool"),
        ("observation", "observation"),  # which templates of ChatGLM know
        ("Narrator", "Narrator"),
    ],
)
def test_roles_have_one_name(role, expected):
    assert read(role=role, content="a") == {"role": expected, "content": "a"}


@pytest.mark.parametrize("role", ["tool", "observation", "function", "function_response"])
def test_results_of_tools_in_sharegpt(role):
    assert read(**{"from": role, "value": "42"}) == {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": CALL},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": json.dumps('{"x": 1}')}}]},
        {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"tool_calls": [{"name": "f", "parameters": {"x": 1}, "function": None, "id": None}]},
        {"tool_calls": [json.dumps({"name": "f", "arguments": {"x": 1}})], "function_call": None},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"tool_calls": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_tool_calls_have_one_form(calls):
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read(role="assistant", content=None, **calls) == expected
    assert read(role="assistant", **calls) == expected


def test_a_call_in_sharegpt_is_a_call_of_the_assistant():
    value = json.dumps({"name": "f", "arguments": {"x": 1}})
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read(**{"from": "function_call", "value": value}) == expected


def test_nulls_of_a_call_stay_where_they_are_arguments():
    call = {"id": "1", "type": None, "function": {"name": "f", "arguments": {"x": None}}}
    assert read(role="assistant", content="a", tool_calls=[call])["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": None}}}
    ]


@pytest.mark.parametrize("empty", [None, "", {}, "{}", "null"])
def test_a_call_without_arguments(empty):
    call = {"function": {"name": "f", "arguments": empty}}
    message = read(role="assistant", tool_calls=[call])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("empty", [None, [], ""])
def test_nulls_and_empty_lists_of_calls_are_no_keys(empty):
    message = read(role="user", content="a", tool_calls=empty, name=None, reasoning_content=None)
    assert message == {"role": "user", "content": "a"}


def test_other_keys_are_kept():
    kept = {"name": "n", "tool_call_id": "1", "weight": 0, "train": False}
    assert read(role="tool", content="a", **kept) == {"role": "tool", "content": "a", **kept}


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_is_found_by_every_template(key):
    expected = {"role": "assistant", "content": "a"} | dict.fromkeys(REASONING_KEYS, "hmm")
    assert read(role="assistant", content="a", **{key: "hmm"}) == expected
    parts = [{"type": "text", "text": "hmm"}]
    assert read(role="assistant", content="a", **{key: parts}) == expected
    assert read(role="assistant", content=None, **{key: "hmm"}) == expected | {"content": ""}


def test_contents_of_parts():
    parts = [
        {"type": "thinking", "thinking": "hm", "text": None},
        {"type": "reasoning", "text": "m"},
        {"type": "text", "text": "a"},
        {"type": "output_text", "text": "b"},
        {"text": "c"},
    ]
    message = read(role="assistant", content=parts)
    assert message["content"] == "abc"
    assert message["thinking"] == message["reasoning_content"] == "hmm"
    assert read(role="user", content=[])["content"] == ""


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user"}, "message 1: got the content None, expected text"),
        ({"role": "user", "content": 3}, "message 1: got the content 3, expected text"),
        ({"content": "a"}, "message 1: got the role None, expected text"),
        ({"role": 1, "content": "a"}, "message 1: got the role 1, expected text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "message 1, part 1: is of type 'image_url', and only text is trained; leave it out",
        ),
        ({"role": "user", "content": ["a"]}, r"message 1: got \['a'\], expected text"),
        ({"role": "user", "content": [{"type": "text"}]}, "part 1: got None, expected text"),
        ({"role": "user", "content": [{"type": ["text"]}]}, r"part 1: is of type \['text'\]"),
        ({"role": "assistant", "tool_calls": ["f"]}, "tool call 1: got 'f', expected an object"),
        ({"role": "assistant", "tool_calls": 3}, "message 1: got the tool calls 3, expected"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "call 1: got the name None, expected"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x = 1"}]},
            "tool call 1, f: got 'x = 1', which is not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            r"tool call 1, f: got the arguments \[1\], expected an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": "\\ud800"}'}]},
            "tool call 1, f: holds half of a surrogate pair",
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "x", "thinking": "y"},
            "has two kinds of reasoning, thinking among them; keep one",
        ),
        ({"role": "assistant", "content": "a", "thinking": True}, "thinking: got True, expected"),
        ({"from": "function_call", "value": "f(1)"}, r"got the tool calls 'f\(1\)', expected"),
    ],
)
def test_bad_messages_are_named(message, sentence):
    with pytest.raises(RowError, match=f"^messages, message 1.*{sentence}|^messages, {sentence}"):
        read(**message)
