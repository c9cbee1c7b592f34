"""Rows become the tokens and offsets of mlx-lm, and bad rows are told apart."""

import types

import pytest
from mlx_lm.tuner.datasets import create_dataset

from mlx_edgelora.data.conversation import Conversation, PlainText, RowError
from mlx_edgelora.data.encode import EVERYTHING, LAST_ANSWER, Encoder
from mlx_edgelora.data.findings import NO_TEXT, UNANSWERED
from mlx_edgelora.data.row_kinds import Features, find_kind


def find_encoder(first, tokenizer, features, mask_prompt):
    """The function row -> (tokens, offset) for rows like the first one."""
    kind = find_kind([first], features)
    encode = Encoder(tokenizer, LAST_ANSWER if mask_prompt else EVERYTHING, "mask_prompt")

    def encoded(row):
        ((tokens, ((start, stop),)),) = encode(kind.read(row)).pieces
        assert stop == len(tokens)
        return tokens, start

    return encoded


CHAT = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6 w7 w8"},
]
ROWS = {
    "text": {"text": "w1 w2 w3"},
    "text that ends itself": {"text": "w1 w2 </s>"},
    "completions": {"prompt": "w1 w2", "completion": "w3 w4 w5"},
    "completions with tools": {"prompt": "w1", "completion": "w3", "tools": [{"name": "search"}]},
    "chat": {"messages": CHAT},
    "tools": {"messages": CHAT, "tools": [{"name": "search"}]},
    "both keys": {"prompt": "w1", "completion": "w2", "text": "w3", "messages": CHAT},
}


@pytest.mark.parametrize(
    ("name", "mask_prompt"),
    [(name, mask) for name in ROWS for mask in (False, True) if not (mask and "text" in name)],
)
def test_tokens_and_offsets_are_those_of_mlx_lm(tokenizer, name, mask_prompt):
    row = ROWS[name]
    theirs = create_dataset([row], tokenizer, types.SimpleNamespace(mask_prompt=mask_prompt))
    ours = find_encoder(row, tokenizer, Features(), mask_prompt)
    assert ours(row) == theirs.process(row)
    assert len(ours(row)[0]) > 2
    assert (ours(row)[1] > 0) == mask_prompt


def test_other_keys_can_hold_the_parts(tokenizer):
    features = Features(prompt="question", completion="answer", text="body", chat="turns")
    for row in (
        {"question": "w1", "answer": "w2", "prompt": 3},
        {"turns": CHAT},
        {"body": "w1 w2"},
    ):
        config = types.SimpleNamespace(
            prompt_feature="question",
            completion_feature="answer",
            text_feature="body",
            chat_feature="turns",
        )
        theirs = create_dataset([row], tokenizer, config).process(row)
        assert find_encoder(row, tokenizer, features, False)(row) == theirs


def test_a_row_without_text_is_left_out(tokenizer):
    for text in ("", " \n"):
        encoded = Encoder(tokenizer, EVERYTHING, "")(PlainText(text))
        assert not encoded.pieces
        assert [finding.kind for finding in encoded.findings] == [NO_TEXT]


def test_a_last_message_that_is_no_answer_is_left_off(tokenizer):
    """mlx-lm trains it: the words of a user."""
    encoded = Encoder(tokenizer, LAST_ANSWER, "mask_prompt")(Conversation(CHAT[:4]))
    ((tokens, ((start, stop),)),) = encoded.pieces
    assert tokenizer.decode(tokens[start:stop]) == "w4 </s>"
    assert stop == len(tokens)
    assert [finding.kind for finding in encoded.findings] == [UNANSWERED]


def test_a_message_that_only_calls_tools_needs_no_content(make_tokenizer):
    row = {"messages": [*CHAT[:2], {"role": "assistant", "tool_calls": [{"name": "search"}]}]}
    tokenizer = make_tokenizer()
    assert find_encoder(row, tokenizer, Features(), True)(row)[1] > 0


THINKING = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> hmm hmm {% endif %}"
)


def test_an_opening_that_only_generation_writes_is_not_taken_from_the_answer(make_tokenizer):
    """As with templates that open a thinking block when asked to generate: mlx-lm masks the
    first tokens of the answer, here the answer begins where the two part."""
    tokenizer = make_tokenizer(THINKING)
    row = {"prompt": "w1", "completion": "w2 w3 w4"}
    tokens, offset = find_encoder(row, tokenizer, Features(), True)(row)
    assert tokenizer.convert_ids_to_tokens(tokens[offset:]) == ["w2", "w3", "w4", "</s>"]
    theirs = create_dataset([row], tokenizer, types.SimpleNamespace(mask_prompt=True))
    assert theirs.process(row)[1] == offset + 2


COUNTING = "w{{ messages | length }} {% for m in messages %}<{{ m.role }}> {% endfor %}"


def test_a_prompt_that_does_not_begin_its_conversation_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(COUNTING)
    row = {"prompt": "w1", "completion": "w2"}
    encode = find_encoder(row, tokenizer, Features(), True)
    with pytest.raises(RowError, match="writes the prompt differently when the answer follows"):
        encode(row)
    assert find_encoder(row, tokenizer, Features(), False)(row)[1] == 0


@pytest.mark.parametrize(
    ("first", "row", "sentence"),
    [
        ({"text": "a"}, {"text": 3}, r"text: got 3, expected text"),
        ({"text": "a"}, {"txt": "a"}, r"got the keys 'txt', expected 'text' as in other rows"),
        ({"text": "a"}, {}, r"got the keys of an empty object, expected 'text'"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, r"expected 'completion' as in"),
        (
            {"prompt": "a", "completion": "b"},
            {"text": "a"},
            r"keys 'text', expected 'prompt' as in",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": None, "completion": "b"},
            r"prompt: got None, expected text",
        ),
        (
            {"messages": []},
            {"messages": "w" * 90},
            r"messages: got 'w{56}\.\.\., expected a list",
        ),
        ({"messages": []}, {"messages": []}, r"messages: got \[\], expected a list of messages"),
        ({"messages": []}, {"messages": ["hello"]}, r"messages, message 1: got 'hello', expected"),
        ({"messages": []}, {"messages": [{"content": "a"}]}, r"message 1: got the role None"),
        (
            {"messages": []},
            {"messages": [CHAT[0], {"role": "user"}]},
            r"messages, message 2: got the content None, expected text",
        ),
        (
            {"messages": []},
            {"messages": [{"role": "judge", "content": "a"}]},
            r"the chat template refuses the messages \(no such role\)",
        ),
        (
            {"messages": []},
            {"messages": CHAT, "tools": "search"},
            r"tools: got 'search', expected a list",
        ),
    ],
)
def test_bad_rows_are_told_apart(tokenizer, first, row, sentence):
    encode = find_encoder(first, tokenizer, Features(), False)
    with pytest.raises(RowError, match=sentence):
        encode(row)


def test_a_first_row_of_no_format_is_refused(tokenizer):
    with pytest.raises(RowError, match=r"got the keys 'q', 'a', expected 'prompt' and 'comp"):
        find_encoder({"q": 1, "a": 2}, tokenizer, Features(), False)


def test_text_has_no_prompt_to_mask(tokenizer):
    encode = find_encoder({"text": "w1"}, tokenizer, Features(), True)
    with pytest.raises(RowError, match=r"got a row of plain text, which has no prompt, with mask"):
        encode({"text": "w1"})


def test_a_tokenizer_without_a_chat_template_is_named(make_tokenizer):
    row = {"messages": CHAT}
    encode = find_encoder(row, make_tokenizer(None), Features(), False)
    with pytest.raises(RowError, match="has no chat template, which this format needs"):
        encode(row)
