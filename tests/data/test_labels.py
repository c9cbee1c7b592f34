"""Labels are exactly what a model generates, in any conversation and form of template, or said."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, FORMS, MISTRAL, R1, made_tokenizer

from mlx_edgelora.data import findings
from mlx_edgelora.data.conversation import REASONING_KEYS, Conversation, PlainText, RowError
from mlx_edgelora.data.encode import ANSWERS, EVERYTHING, LAST_ANSWER, Encoder

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text, reasoning=None, **more):
    thought = dict.fromkeys(REASONING_KEYS, reasoning) if reasoning else {}
    return {"role": "assistant", "content": text} | thought | more


def call(name="get_weather", reasoning=None, **arguments):
    function = {"name": name, "arguments": arguments}
    return answer("", reasoning, tool_calls=[{"type": "function", "function": function}])


def result(text):
    return {"role": "tool", "content": text}


def encode(tokenizer, messages, train_on=ANSWERS, tools=None, prompt_messages=None):
    row = Conversation(messages, tools, prompt_messages)
    return Encoder(tokenizer, train_on, f"--train-on {train_on}")(row)


def labels(tokenizer, encoded):
    """The text before each label and the label, in the order of the conversation."""
    found = []
    for tokens, spans in encoded.pieces:
        for start, stop in spans:
            before = tokenizer.decode(tokens[:start])
            found.append((before, tokenizer.decode(tokens[start:stop])))
    return sorted(found, key=lambda pair: len(pair[0]))


def kinds(encoded):
    return {finding.kind for finding in encoded.findings}


def lost(encoded):
    return {kind for kind in kinds(encoded) if kind.lost}


# --- any conversation, any template ---------------------------------------------------------

SHORT = ("a", "e", "4", "no", "user", "assistant", "model", "think", "{", '"', "im_end", "s")
TEXTS = st.one_of(
    st.sampled_from(SHORT),
    st.sampled_from(("two\nlines", "a <b> & 'c'", "ünï 😀", "What is in a name?", "\\n {%")),
    st.text("abc xyz.\n\"'{}", min_size=1, max_size=30).map(str.strip).filter(bool),
)


@st.composite
def conversations(draw):
    messages, uses_tools = [], draw(st.booleans())
    thoughts = st.none() if draw(st.booleans()) else TEXTS
    if draw(st.booleans()):
        messages.append(system(draw(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXTS)))
        if uses_tools and draw(st.booleans()):
            messages.append(call("get_weather", draw(thoughts), city=draw(TEXTS), days=3))
            messages.append(result(draw(TEXTS)))
        messages.append(answer(draw(TEXTS), draw(thoughts)))
    return messages, TOOLS if uses_tools else None


def expected_losses(form, messages, tools):
    """What the form does not write, by name."""
    answers = [message for message in messages if message["role"] == "assistant"]
    found = set()
    if any("thinking" in message for message in answers):
        found |= {"reasoning"} & form.loses
    if any("tool_calls" in message for message in answers):
        found |= {"tool calls"} & form.loses
    if tools:
        found |= {"tools"} & form.loses
    is_after_tool = any(message["role"] == "tool" for message in messages)
    if form.template is MISTRAL and messages[0]["role"] == "system" and is_after_tool:
        found.add("system")
    return found


NAMES = {
    findings.REASONING: "reasoning",
    findings.TOOL_CALLS: "tool calls",
    findings.TOOLS: "tools",
    findings.SYSTEM: "system",
    findings.TEXT: "text",
}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25, deadline=None)
@given(drawn=conversations())
def test_labels_are_what_a_model_generates_or_the_row_is_reported(name, drawn):
    (messages, tools), form = drawn, FORMS[name]
    tokenizer = form.tokenizer
    try:
        encoded = encode(tokenizer, messages, tools=tools)
    except RowError as error:
        assert "must alternate" in str(error) and any(m["role"] == "tool" for m in messages)
        return
    found = labels(tokenizer, encoded)
    wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) == len(wanted)
    told = {NAMES[kind] for kind in lost(encoded)}
    if form.template is R1:  # it does not write results of tools either
        told.discard("text")
    assert told == expected_losses(form, messages, tools)
    for number, (before, label) in zip(wanted, found, strict=True):
        is_last = number == wanted[-1]
        assert label == form.generated(messages[number], is_last=is_last)
        prompt = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert before == prompt.removesuffix("<think>\n")


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10, deadline=None)
@given(drawn=conversations())
def test_the_last_answer_is_the_last_of_all_answers(name, drawn):
    (messages, tools), tokenizer = drawn, FORMS[name].tokenizer
    try:
        every = labels(tokenizer, encode(tokenizer, messages, tools=tools))
    except RowError:
        return
    last = encode(tokenizer, messages, LAST_ANSWER, tools)
    assert labels(tokenizer, last) == every[-1:]
    assert (findings.EARLIER in kinds(last)) == (len(every) > 1)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10, deadline=None)
@given(drawn=conversations())
def test_everything_is_the_rendering(name, drawn):
    (messages, tools), tokenizer = drawn, FORMS[name].tokenizer
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    except Exception:  # noqa: BLE001, what templates raise
        return
    ((tokens, spans),) = encode(tokenizer, messages, EVERYTHING, tools).pieces
    assert (tokens, spans) == (rendered, [(0, len(rendered))])


# --- what templates do to answers -----------------------------------------------------------


def test_reasoning_that_the_template_cuts_is_reported():
    tokenizer = FORMS["DeepSeek-R1"].tokenizer
    messages = [user("2+2?"), answer("<think>\n2+2 is 4\n</think>\n\n4")]
    for train_on in (ANSWERS, LAST_ANSWER, EVERYTHING):
        encoded = encode(tokenizer, messages, train_on)
        assert lost(encoded) == {findings.REASONING}
        assert encoded.having == {findings.REASONING, findings.TEXT}


def test_reasoning_in_content_is_found_where_the_template_writes_it_otherwise():
    tokenizer = FORMS["Qwen 3"].tokenizer
    for content in ("<think>because</think>4", "<think>\nbecause\n</think>\n\n4"):
        encoded = encode(tokenizer, [user("2+2?"), answer(content)])
        assert not encoded.findings
        ((_, label),) = labels(tokenizer, encoded)
        assert label == "<think>\nbecause\n</think>\n\n4<|im_end|>\n"


def test_an_answer_whose_reasoning_is_cut_later_is_a_row_of_its_own():
    tokenizer = FORMS["Qwen 3"].tokenizer
    messages = [user("one"), answer("1", "first"), user("two"), answer("2", "second")]
    encoded = encode(tokenizer, messages)
    (first, one), (second, two) = encoded.pieces
    assert "first" in tokenizer.decode(first) and "two" not in tokenizer.decode(first)
    assert "first" not in tokenizer.decode(second)
    assert (len(one), len(two)) == (1, 1)
    assert kinds(encoded) == {findings.APART}
    last = encode(tokenizer, messages, LAST_ANSWER)
    assert last.pieces == [(second, two)]
    assert kinds(last) == {findings.EARLIER, findings.CUT_EARLIER}
    assert kinds(encode(tokenizer, messages, EVERYTHING)) == {findings.CUT_EARLIER}


def test_answers_without_reasoning_stay_in_one_row():
    tokenizer = FORMS["Qwen 3"].tokenizer
    messages = [user("one"), answer("1"), user("two"), answer("2")]
    encoded = encode(tokenizer, messages)
    assert len(encoded.pieces) == 1 and not encoded.findings


def test_earlier_answers_end_as_generation_ends_them():
    """In gpt-oss's whole conversation they end with a token at which nothing stops."""
    tokenizer = FORMS["gpt-oss"].tokenizer
    encoded = encode(tokenizer, [user("one"), answer("1"), user("two"), answer("2")])
    assert [label[-10:] for _, label in labels(tokenizer, encoded)] == ["<|return|>"] * 2
    assert kinds(encoded) == {findings.APART}


def test_a_system_message_that_only_generation_writes_is_in_the_row():
    """As Mistral's: without the answer the last message is the user's, and gets it."""
    tokenizer = FORMS["Mistral"].tokenizer
    messages = [system("ANSWER IN FRENCH"), user("hello"), answer("bonjour")]
    for train_on in (ANSWERS, LAST_ANSWER):
        encoded = encode(tokenizer, messages, train_on)
        (found,) = labels(tokenizer, encoded)
        assert found == ("<bos>[INST] ANSWER IN FRENCH\n\nhello[/INST]", " bonjour<eos>")
        assert not encoded.findings
    assert lost(encode(tokenizer, messages, EVERYTHING)) == {findings.SYSTEM}


def test_the_masks_of_templates_are_used():
    """They exclude the line break that the difference of renderings includes."""
    marked, plain = FORMS["ChatML, marked"].tokenizer, FORMS["ChatML"].tokenizer
    messages = [user("one"), answer("1"), user("two"), answer("2")]
    assert [label for _, label in labels(marked, encode(marked, messages))] == [
        "1<|im_end|>",
        "2<|im_end|>",
    ]
    assert [label for _, label in labels(plain, encode(plain, messages))] == [
        "1<|im_end|>\n",
        "2<|im_end|>\n",
    ]


def test_a_mask_without_the_end_of_the_turn_gets_it():
    template = FORMS["ChatML, marked"].template.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    tokenizer = made_tokenizer(template)
    encoded = encode(tokenizer, [user("one"), answer("1"), user("two"), answer("2")])
    assert [label for _, label in labels(tokenizer, encoded)] == ["1<|im_end|>", "2<|im_end|>"]


def test_a_mask_tells_an_answer_whose_prompt_is_written_otherwise():
    marked, users = FORMS["ChatML, marked"].template, "{% else %}{{ m.content }}"
    for template in (  # the prompt ends like the row, or not even with the user's message
        "{{ messages | length }} " + marked,
        marked.replace(users, users + "{{ messages | length }}"),
    ):
        _check_marked(made_tokenizer(template))


def _check_marked(tokenizer):
    encoded = encode(tokenizer, [user("one"), answer("1"), user("two"), answer("2")])
    assert [label for _, label in labels(tokenizer, encoded)] == ["1<|im_end|>", "2<|im_end|>"]


@pytest.mark.parametrize("name", ["ChatML", "ChatML, marked", "Llama 3", "Qwen 3", "gpt-oss"])
def test_a_conversation_may_begin_with_an_answer(name):
    tokenizer, form = FORMS[name].tokenizer, FORMS[name]
    messages = [answer("Hello, a greeting"), user("one"), answer("1")]
    found = [label for _, label in labels(tokenizer, encode(tokenizer, messages))]
    assert sorted(found) == sorted(
        form.generated(message, is_last=i == 2) for i, message in enumerate(messages) if i != 1
    )


# --- which answers --------------------------------------------------------------------------


def test_all_answers_or_the_last_one():
    tokenizer = FORMS["ChatML"].tokenizer
    messages = [user("q1"), answer("first answer"), user("q2"), answer("second answer")]
    every = [label for _, label in labels(tokenizer, encode(tokenizer, messages))]
    assert every == ["first answer<|im_end|>\n", "second answer<|im_end|>\n"]
    last = encode(tokenizer, messages, LAST_ANSWER)
    assert [label for _, label in labels(tokenizer, last)] == every[1:]
    assert kinds(last) == {findings.EARLIER}


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"train": 0}, {"weight": 0.0}])
def test_messages_that_are_not_to_be_trained(off):
    tokenizer = FORMS["ChatML"].tokenizer
    messages = [user("q1"), answer("first") | off, user("q2"), answer("second", weight=1)]
    assert labels(tokenizer, encode(tokenizer, messages))[0][1] == "second<|im_end|>\n"
    ((tokens, spans),) = encode(tokenizer, messages, EVERYTHING).pieces
    text = "".join(tokenizer.decode(tokens[start:stop]) for start, stop in spans)
    assert "first" not in text and "q1" in text and "second" in text
    last_off = [user("q1"), answer("first"), user("q2"), answer("second") | off]
    assert not encode(tokenizer, last_off, LAST_ANSWER).pieces
    assert labels(tokenizer, encode(tokenizer, last_off))[0][1] == "first<|im_end|>\n"
    for value in (0.5, "no", 2, None):
        with pytest.raises(RowError, match=r"weight of a message: got .*, expected 0 or 1"):
            encode(tokenizer, [user("q"), answer("a", weight=value)])


@pytest.mark.parametrize("train_on", [ANSWERS, LAST_ANSWER])
def test_a_last_message_that_is_no_answer_is_no_label(train_on):
    tokenizer = FORMS["ChatML"].tokenizer
    for last in (user("thanks, bye"), result("RESULT 42")):
        encoded = encode(tokenizer, [user("q"), answer("the answer"), last], train_on)
        ((tokens, _),) = encoded.pieces
        assert labels(tokenizer, encoded)[0][1] == "the answer<|im_end|>\n"
        assert last["content"] not in tokenizer.decode(tokens)
        assert kinds(encoded) == {findings.UNANSWERED}
    encoded = encode(tokenizer, [user("q"), {"role": "gpt", "content": "a"}], train_on)
    assert not encoded.pieces
    assert encoded.findings == [(findings.NO_ANSWER, "roles user, gpt")]


def test_answers_in_a_prompt_are_no_labels():
    tokenizer = FORMS["ChatML"].tokenizer
    messages = [user("q1"), answer("shown"), user("q2"), answer("trained")]
    found = labels(tokenizer, encode(tokenizer, messages, prompt_messages=3))
    assert [label for _, label in found] == ["trained<|im_end|>\n"]


def test_empty_answers_are_left_out():
    tokenizer = FORMS["ChatML"].tokenizer
    for train_on in (ANSWERS, LAST_ANSWER, EVERYTHING):
        encoded = encode(tokenizer, [user("q"), answer(" \n")], train_on)
        assert not encoded.pieces and kinds(encoded) == {findings.EMPTY}
    messages = [user("q"), answer(""), user("again"), answer("a")]
    encoded = encode(tokenizer, messages)
    assert [label for _, label in labels(tokenizer, encoded)] == ["a<|im_end|>\n"]
    assert kinds(encoded) == {findings.EMPTY}


# --- ends and beginnings --------------------------------------------------------------------


def test_an_answer_at_which_generation_would_not_end_gets_an_end():
    tokenizer = made_tokenizer(CHATML, "<eos>")
    for train_on in (ANSWERS, LAST_ANSWER, EVERYTHING):
        encoded = encode(tokenizer, [user("q"), answer("a")], train_on)
        ((tokens, spans),) = encoded.pieces
        assert tokenizer.decode(tokens[-3:]) == "<|im_end|>\n<eos>"
        assert spans[-1][1] == len(tokens)
        assert kinds(encoded) == {findings.ADDED_END}
    assert not encode(FORMS["Gemma"].tokenizer, [user("q"), answer("a")]).findings


def test_text_begins_once():
    tokenizer = FORMS["Llama 3"].tokenizer
    encoder = Encoder(tokenizer, EVERYTHING, "")
    for text in ("<bos>hi", "hi"):
        ((tokens, spans),) = encoder(PlainText(text)).pieces
        assert tokenizer.decode(tokens) == "<bos>hi<|eot_id|>"
        assert spans == [(0, len(tokens))]
    ((tokens, spans),) = encoder(PlainText("<bos><bos>hi")).pieces
    assert tokenizer.decode(tokens) == "<bos>hi<|eot_id|>" and spans == [(0, len(tokens))]


def test_a_template_that_begins_twice():
    tokenizer = made_tokenizer(
        "{{ bos_token }}" + FORMS["Llama 3"].template, "<|eot_id|>", begin="<bos>"
    )
    ((tokens, ((start, stop),)),) = encode(tokenizer, [user("q"), answer("a")]).pieces
    assert tokenizer.decode(tokens).count("<bos>") == 1
    assert tokenizer.decode(tokens[start:stop]) == "a<|eot_id|>"


def test_characters_without_tokens_are_reported(make_tokenizer):
    tokenizer = make_tokenizer()
    assert lost(encode(tokenizer, [user("w1"), answer("w2")])) == set()
    for train_on in (ANSWERS, EVERYTHING):
        encoded = encode(tokenizer, [user("w1 smile"), answer("w2")], train_on)
        assert encoded.findings == [(findings.UNKNOWN, "<user> w1 [UNK] </s> <assistant> w2")]


# --- what has to be found -------------------------------------------------------------------


def test_contents_are_found_however_they_are_written():
    messages = [
        user('It\'s "5 < 6"'),
        call(city='São "Paulo"', when={"days": [1, 2.5], "note": "a\nb"}, ok=True),
        result('{"rain": "ja"}\nline'),
        answer("ünï <b> & 'c'"),
    ]
    for name in ("Qwen 3", "Mistral", "gpt-oss"):
        tokenizer = FORMS[name].tokenizer
        assert not lost(encode(tokenizer, messages, tools=TOOLS)), name


@pytest.mark.parametrize("content", ["a", "e", "assistant", "The quick brown fox"])
def test_short_contents_are_not_found_by_chance(content):
    """`a` is in `assistant`, which every template writes."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'user' else '' }}")
    tokenizer = made_tokenizer(template)
    for train_on in (ANSWERS, EVERYTHING):
        encoded = encode(tokenizer, [user(content), answer("fine")], train_on)
        assert lost(encoded) == {findings.TEXT}


def test_tools_that_the_template_does_not_know_are_reported():
    tokenizer = FORMS["ChatML"].tokenizer
    messages = [user("weather in Oslo?"), call(city="Oslo")]
    assert lost(encode(tokenizer, messages)) == {findings.TOOL_CALLS}
    assert lost(encode(tokenizer, messages, tools=TOOLS)) == {findings.TOOL_CALLS, findings.TOOLS}


def test_a_call_without_its_arguments_is_reported():
    template = FORMS["Qwen 3"].template.replace("c.function.arguments | tojson", "'{}'")
    tokenizer = made_tokenizer(template)
    for city in ("Oslo", "a"):
        encoded = encode(tokenizer, [user("weather?"), call(city=city)])
        assert lost(encoded) == {findings.TOOL_CALLS}
