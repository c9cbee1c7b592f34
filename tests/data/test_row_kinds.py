"""Which kind rows are of, and what each kind means."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edgelora.data.conversation import REASONING_KEYS, Conversation, PlainText, RowError
from mlx_edgelora.data.row_kinds import Features, find_kind

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PAIR = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "s"}
THOUGHT = ASSISTANT | dict.fromkeys(REASONING_KEYS, "hmm")
TOOLS = [{"type": "function", "function": {"name": "f"}}]

# row, kind, messages
PAIRS = [
    ({"prompt": "q", "completion": "a"}, "completions", PAIR),
    ({"prompt": "q", "completion": "a", "text": "t", "messages": PAIR}, "completions", PAIR),
    ({"Prompt": "q", "Completion ": "a"}, "completions", PAIR),
    ({"prompt": "q", "completion": "a", "system": "s"}, "completions", [SYSTEM, *PAIR]),
    ({"prompt": "q", "completion": "a", "reasoning": "hmm"}, "completions", [USER, THOUGHT]),
    ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "completions", [SYSTEM, *PAIR]),
    ({"prompt": [USER], "completion": "a"}, "completions", PAIR),
    ({"prompt": [{"type": "text", "text": "q"}], "completion": "a"}, "completions", PAIR),
    ({"prompt": "q", "response": "a"}, "qa", PAIR),
    ({"question": "q", "answer": "a", "id": 3}, "qa", PAIR),
    ({"Question": "q", "Answer": "a"}, "qa", PAIR),
    ({"system_prompt": "s", "question": "q", "response": "a"}, "qa", [SYSTEM, *PAIR]),
    ({"query": "q", "response": "a"}, "qa", PAIR),
    ({"input": "q", "output": "a"}, "qa", PAIR),
    ({"instruction": "q", "output": "a"}, "alpaca", PAIR),
    ({"instruction": "q", "input": "", "output": "a"}, "alpaca", PAIR),
    ({"instruction": "q", "input": None, "output": "a"}, "alpaca", PAIR),
    ({"instruction": "q", "input": float("nan"), "output": "a"}, "alpaca", PAIR),
    ({"instruction": "q", "context": "", "response": "a"}, "alpaca", PAIR),
    (
        {"instruction": "q", "input": "more", "output": "a"},
        "alpaca",
        [{"role": "user", "content": "q\n\nmore"}, ASSISTANT],
    ),
    (
        {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]},
        "alpaca",
        [SYSTEM, *PAIR, *PAIR],
    ),
]
CHATS = [
    ({"messages": PAIR}, "chat", PAIR),
    ({"messages": json.dumps(PAIR)}, "chat", PAIR),
    ({"messages": PAIR, "text": "t"}, "chat", PAIR),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "sharegpt",
        PAIR,
    ),
    ({"conversation": PAIR}, "sharegpt", PAIR),
    ({"system": "s", "conversations": PAIR}, "sharegpt", [SYSTEM, *PAIR]),
    ({"system": "s", "messages": [SYSTEM, *PAIR]}, "chat", [SYSTEM, *PAIR]),
    ({"system": "", "messages": PAIR}, "chat", PAIR),
]


@pytest.mark.parametrize(("row", "name", "messages"), PAIRS)
def test_prompts_and_answers(row, name, messages):
    kind = find_kind([row])
    assert kind.name == name
    assert kind.read(row) == Conversation(messages, None, len(messages) - 1)


@pytest.mark.parametrize(("row", "name", "messages"), CHATS)
def test_conversations(row, name, messages):
    kind = find_kind([row])
    assert (kind.name, kind.read(row)) == (name, Conversation(messages))


def test_text_wins_over_other_tools_kinds_as_in_mlx_lm():
    """The original Alpaca data has both; a configuration of mlx-lm trains its text."""
    row = {"instruction": "q", "input": "", "output": "a", "text": "all"}
    kind = find_kind([row])
    assert kind.read(row) == PlainText("all")
    assert str(kind) == "text (text); not used: instruction, input, output"
    assert find_kind([row], kind="alpaca").read(row) == Conversation(PAIR, None, 1)


def test_optional_columns_may_come_later_than_the_rows_looked_at():
    kind = find_kind([{"prompt": "q", "completion": "a"}])
    row = {"prompt": "q", "completion": "a", "tools": TOOLS, "system": None, "system_prompt": "s"}
    assert kind.read(row | {"thinking": "hmm"}) == Conversation([SYSTEM, USER, THOUGHT], TOOLS, 2)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (TOOLS, TOOLS),
        (json.dumps(TOOLS), TOOLS),
        ([json.dumps(TOOLS[0])], TOOLS),
        (TOOLS[0], TOOLS),
        ([], None),
        ("", None),
        ("[]", None),
        (None, None),
    ],
)
def test_tools_of_every_kind_of_row(tools, expected):
    for rest in ({"messages": PAIR}, {"prompt": "q", "completion": "a"}, {"conversations": PAIR}):
        row = rest | {"tools": tools}
        assert find_kind([row]).read(row).tools == expected
        legacy = {"functions" if key == "tools" else key: value for key, value in row.items()}
        assert find_kind([legacy]).read(legacy).tools == expected


def test_the_kind_is_that_of_most_rows_whichever_columns_the_first_has():
    first = {"instruction": "q", "output": "a"}
    rows = [first, first | {"input": "more", "system": "s"}, {"note": 1}]
    kind = find_kind(rows)
    assert kind.found == ("instruction", "output", "input", "system")
    assert kind.unused == ("note",)
    assert kind.read(rows[0]).messages == PAIR
    assert kind.read(rows[1]).messages[1]["content"] == "q\n\nmore"
    with pytest.raises(RowError, match=r"got the keys 'note', expected '\w+' as in other rows"):
        kind.read(rows[2])
    odd_first = [{"messages": None, "text": "t"}, *[{"messages": PAIR}] * 2]
    assert find_kind(odd_first).name == "chat"
    # Of as many, the first row decides, as in mlx-lm.
    assert find_kind([{"text": "t"}, {"prompt": "q", "completion": "a"}]).name == "text"


def test_named_columns_are_the_only_ones_looked_for():
    features = Features(prompt="task", completion="result")
    row = {"task": "q", "input": "not trained", "result": "a"}
    assert find_kind([row], features).read(row).messages == PAIR
    with pytest.raises(RowError, match=r"^got the keys 'question', 'answer', expected 'task' and"):
        find_kind([{"question": "q", "answer": "a"}], features)
    alpaca = find_kind([row], features, kind="alpaca").read(row)
    assert alpaca.messages[0]["content"] == "q\n\nnot trained"
    turns = {"turns": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    for kind in (None, "chat", "sharegpt"):
        assert find_kind([turns], Features(chat="turns"), kind).read(turns).messages == PAIR


def test_a_kind_can_be_asked_for():
    row = {"prompt": "q", "completion": "a", "text": "t", "messages": PAIR}
    assert find_kind([row], kind="text").read(row) == PlainText("t")
    assert find_kind([row], kind="chat").read(row) == Conversation(PAIR)
    with pytest.raises(RowError, match=r"expected 'question' and 'answer'$"):
        find_kind([row], kind="qa")


def test_a_system_prompt_is_added_where_there_is_none():
    kind = find_kind([{"messages": PAIR}], system_prompt="new")
    new = {"role": "system", "content": "new"}
    assert kind.read({"messages": PAIR}).messages == [new, *PAIR]
    assert kind.read({"messages": [SYSTEM, *PAIR]}).messages == [SYSTEM, *PAIR]
    developer = {"role": "developer", "content": "d"}
    assert kind.read({"messages": [developer, *PAIR]}).messages == [developer, *PAIR]
    row = {"prompt": "q", "completion": "a"}
    pair = find_kind([row], system_prompt="new").read(row)
    assert (pair.messages, pair.prompt_messages) == ([new, *PAIR], 2)
    own = row | {"system": "s"}
    assert find_kind([own], system_prompt="new").read(own).messages == [SYSTEM, *PAIR]
    with pytest.raises(RowError, match="is plain text, which has no conversation that --system-pr"):
        find_kind([{"text": "t"}], system_prompt="new")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": None, "completion": "a"}, "^prompt: got None, expected text"),
        ({"prompt": "q", "completion": 3}, "^completion: got 3, expected text"),
        ({"prompt": ["q"], "completion": "a"}, r"^prompt: got \['q'\], expected text"),
        ({"instruction": "q", "output": None}, "^output: got None, expected text"),
        ({"instruction": "q", "input": 3, "output": "a"}, "^input: got 3, expected text"),
        ({"instruction": "q", "output": "a", "history": ["a"]}, "^history: got 'a', expected pair"),
        ({"prompt": "q", "completion": "a", "system": 1}, "^system: got 1, expected text"),
        ({"prompt": "q", "completion": "a", "tools": "t"}, "^tools: got 't', expected a list"),
        ({"prompt": "q", "completion": "a", "tools": ["t"]}, "^tools, tool 1: got 't', expected"),
        ({"messages": "[1"}, r"^messages: got '\[1', which is not JSON"),
        ({"messages": [SYSTEM, USER], "system": "other"}, "^system: has a system prompt, and so"),
        ({"conversations": []}, r"^conversations: got \[\], expected a list of messages"),
        ({}, "^got the keys of an empty object, expected 'prompt' and 'completion', or 'messages'"),
        (
            {str(n): n for n in range(20)},
            r"'7' and 12 more, expected .* or 'question' and 'answer'",
        ),
    ],
)
def test_bad_rows_are_told_apart(row, sentence):
    with pytest.raises(RowError, match=sentence):
        find_kind([row]).read(row)


def test_deep_rows_are_refused():
    deep = "[" * 150 + "]" * 150
    row = {"messages": PAIR, "tools": [{"function": json.loads(deep)}]}
    with pytest.raises(RowError, match="tools, tool 1: is nested more than 100 deep"):
        find_kind([row]).read(row)
    part = "text"
    for _ in range(2000):
        part = [{"type": "text", "text": part}]
    row = {"messages": [{"role": "user", "content": part}]}
    with pytest.raises(RowError, match="is nested too deeply"):
        find_kind([row]).read(row)


WORDS = """messages prompt completion text conversations instruction input output role content from
value tool_calls function name arguments tools type thinking reasoning_content system history
function_call"""
KEYS = st.sampled_from(WORDS.split())
TEXTS = st.sampled_from(["", "a", "user", "gpt", "function_call", "text", "thinking", "{}", "[]"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


COLUMNS = st.sampled_from([["messages"], ["prompt", "completion"], ["instruction", "output"]])
MESSAGES = st.fixed_dictionaries(
    {"role": TEXTS | VALUES, "content": TEXTS | VALUES},
    optional={"tool_calls": VALUES, "thinking": TEXTS | VALUES, "name": VALUES},
)
CELLS = TEXTS | VALUES | st.lists(MESSAGES, min_size=1, max_size=2)
ANY_ROWS = COLUMNS.flatmap(
    lambda names: st.fixed_dictionaries(
        dict.fromkeys(names, CELLS), optional={"tools": CELLS, "system": CELLS, "input": CELLS}
    )
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | ANY_ROWS, min_size=1, max_size=3))
def test_any_row_is_read_or_refused(rows):
    for row in rows:
        try:
            found = find_kind(rows).read(row)
        except RowError:
            continue
        if isinstance(found, PlainText):
            assert isinstance(found.text, str)
            continue
        assert found.messages
        for message in found.messages:
            assert isinstance(message["role"], str) and isinstance(message["content"], str)
            assert None not in message.values()
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["name"], str)
                assert isinstance(call["function"]["arguments"], dict)
