"""From options to data sets: folders, the Hub, and what bad input gets."""

import sys
import types

import pytest

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import load_datasets
from mlx_edgelora.errors import EdgeLoraError

TEXT = [{"text": f"w{n} w{n + 1} w3"} for n in range(6)]
PAIRS = [{"prompt": f"w{n}", "completion": f"w{n + 1} w3"} for n in range(6)]


def load(tokenizer, data, **options):
    return load_datasets(TrainConfig(data=data, batch_size=2, **options), tokenizer)


def lines(dataset, tokenizer):
    return [tokenizer.decode(tokens.tolist()) for tokens, _ in dataset]


def test_a_folder_gives_the_sets_that_the_run_needs(tokenizer, folder):
    data = folder(train=TEXT, valid=TEXT[:2], test=TEXT[:3])
    train, valid, test = load(tokenizer, data)
    assert (len(train), len(valid), test) == (6, 2, None)
    assert lines(train, tokenizer)[1] == "w1 w2 w3 </s>"
    assert train.place(5).endswith("train.jsonl: line 6")
    assert [part and len(part) for part in load(tokenizer, data, test=True)] == [None, None, 3]
    assert load(tokenizer, data, val_batches=0)[1] is None


def test_a_missing_valid_set_means_no_validation(tokenizer, folder):
    assert load(tokenizer, folder(train=TEXT))[1] is None


def test_blank_lines_are_skipped_and_counted_as_lines(tokenizer, folder):
    data = folder(train='\ufeff{"text": "w1 w2"}\n\n  \n{"text": "w3 w4"}\n\n')
    train, _, _ = load(tokenizer, data)
    assert [train.place(i)[-6:] for i in range(2)] == ["line 1", "line 4"]


def test_prompts_are_masked_and_features_renamed(tokenizer, folder):
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in PAIRS]
    train, _, _ = load(
        tokenizer, folder(train=rows), mask_prompt=True, prompt_feature="q", completion_feature="a"
    )
    tokens, spans = train[0]
    assert tokenizer.decode(tokens.tolist()) == "<user> w0 </s> <assistant> w1 w3 </s>"
    assert spans.tolist() == [[4, 7]]


def test_rows_longer_than_the_limit_are_truncated_with_one_warning(tokenizer, folder):
    train, _, _ = load(tokenizer, folder(train=TEXT), max_seq_length=3)
    assert "6 longer than max_seq_length 3 (up to 4 tokens)" in train.report.warning()


def test_no_trainable_token_after_masking_names_the_file(tokenizer, folder):
    with pytest.raises(EdgeLoraError, match=r"train\.jsonl: none of its 6 rows has a token to tra"):
        load(tokenizer, folder(train=PAIRS), mask_prompt=True, max_seq_length=4)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "w1"', r"is not JSON \(.* at column 14\), expected one object per line"),
        ('["w1"]', r"got a JSON list, expected an object such as"),
        ("null", r"got a JSON NoneType, expected an object"),
        ('{"text": ["w1"]}', r"text: got \['w1'\], expected text"),
        ('{"prompt": "w1", "completion": "w2"}', r"got the keys 'prompt', 'completion', expected"),
        ("[" * 100_000, r"is nested too deeply|is not JSON"),
    ],
)
def test_a_bad_line_is_named(tokenizer, folder, line, sentence):
    data = folder(train=f'{{"text": "w1 w2"}}\n\n{line}\n')
    with pytest.raises(EdgeLoraError, match=rf"train\.jsonl: line 3: ({sentence})"):
        load(tokenizer, data)


def test_a_line_that_is_not_text_is_named(tokenizer, folder, tmp_path):
    data = folder(train=TEXT)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "w1 w2"}\n{"text": "\xff"}\n')
    with pytest.raises(EdgeLoraError, match=r"train\.jsonl: line 2: is not UTF-8 text"):
        load(tokenizer, data)


@pytest.mark.parametrize(
    ("splits", "options", "sentence"),
    [
        ({"valid": TEXT}, {}, r"has no train set, expected train\.jsonl in the folder"),
        ({"train": TEXT}, {"test": True}, r"has no test set, expected test\.jsonl"),
        ({"train": ""}, {}, r"train\.jsonl: has no rows, expected at least one"),
        ({"train": TEXT, "valid": "\n"}, {}, r"valid\.jsonl: has no rows"),
        ({"train": TEXT}, {"mask_prompt": True}, r"line 1: got a row of plain text, which has no"),
        ({"train": [{"q": "w1"}]}, {}, r"train\.jsonl: line 1: got the keys 'q', expected 'prompt"),
    ],
)
def test_bad_folders_are_refused(tokenizer, folder, splits, options, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        load(tokenizer, folder(**splits), **options)


def test_what_is_no_data_is_told_apart(tokenizer, tmp_path):
    (tmp_path / "notes.md").write_text("notes")
    with pytest.raises(EdgeLoraError, match=r"notes\.md: its name says no kind of file that is"):
        load(tokenizer, str(tmp_path / "notes.md"))
    with pytest.raises(EdgeLoraError, match=r"data: ./none does not exist, expected a folder with"):
        load(tokenizer, "./none")
    with pytest.raises(EdgeLoraError, match=r"data: a/b/c does not exist"):
        load(tokenizer, "a/b/c")
    with pytest.raises(EdgeLoraError, match=r"data: got nothing, expected a folder, a file"):
        load(tokenizer, None)


def test_an_unreadable_file_is_named(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(EdgeLoraError, match=r"train\.jsonl: cannot be read \(Is a directory\)"):
        load(tokenizer, str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`; `hub.calls` are the arguments it got."""
    module = types.ModuleType("datasets")
    module.calls = []
    module.sets = {"someone/pairs": {"train": PAIRS, "test": PAIRS[:2]}, "texts": {"train": TEXT}}

    def load_dataset(path, split=None, **config):
        module.calls.append((path, split, config))
        if path not in module.sets:
            raise FileNotFoundError(f"Dataset {path}\ndoesn't exist")
        splits = module.sets[path]
        return splits if split is None else splits[split.split("[", maxsplit=1)[0]]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_name_on_the_hub(tokenizer, hub):
    train, valid, _ = load(tokenizer, "someone/pairs")
    assert (len(train), valid) == (6, None)
    assert train.place(2) == "someone/pairs train: row 3"
    assert len(load(tokenizer, "someone/pairs", test=True)[2]) == 2


def test_hub_data_sets_with_splits_are_joined_as_in_mlx_lm(tokenizer, hub):
    entries = [
        {"path": "someone/pairs", "train_split": "train[:50%]", "config": {"name": "small"}},
        {"path": "texts"},
    ]
    train, valid, test = load(tokenizer, "ignored", hf_dataset=entries)
    assert (len(train), len(valid), test) == (12, 12, None)
    assert hub.calls == [
        ("someone/pairs", "train[:50%]", {"name": "small"}),
        ("someone/pairs", "train[-10%:]", {"name": "small"}),
        ("texts", "train[:80%]", {}),
        ("texts", "train[-10%:]", {}),
    ]
    assert train.place(11) == "texts train[:80%]: row 6"


def test_only_the_needed_splits_are_loaded(tokenizer, hub):
    entry = {"path": "someone/pairs", "test_split": "test"}
    assert len(load(tokenizer, None, hf_dataset=entry, test=True)[2]) == 2
    assert hub.calls == [("someone/pairs", "test", {})]


def test_features_of_an_entry_win_over_those_of_the_run(tokenizer, hub):
    hub.sets["qa"] = {"train": [{"q": "w1", "a": "w2"}] * 2}
    entry = {"path": "qa", "prompt_feature": "q"}
    train, _, _ = load(
        tokenizer, None, hf_dataset=entry, prompt_feature="x", completion_feature="a"
    )
    assert lines(train, tokenizer)[0] == "<user> w1 </s> <assistant> w2 </s>"


def test_bad_hub_names_are_refused(tokenizer, hub):
    with pytest.raises(
        EdgeLoraError, match=r"data: 'no/such', no folder here, cannot be .* doesn't exist\)"
    ):
        load(tokenizer, "no/such")
    entry = {"path": "texts", "config": {"split": "train"}}
    with pytest.raises(EdgeLoraError, match=r"hf_dataset: 'texts' cannot be .* 'split'"):
        load(tokenizer, None, hf_dataset=entry)
    with pytest.raises(EdgeLoraError, match=r"hf_dataset\.test_split: missing for texts, expected"):
        load(tokenizer, None, hf_dataset={"path": "texts"}, test=True)


def test_the_hub_without_its_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        EdgeLoraError, match=r"'my/data', no folder here, needs .*`pip install data"
    ):
        load(tokenizer, "my/data")


THOUGHT = {"reasoning_content": "because", "role": "assistant", "content": "w2"}


def test_a_set_that_loses_content_by_rule_is_refused_with_a_remedy(tokenizer, folder):
    """The template of these tests knows no reasoning."""
    rows = [{"messages": [{"role": "user", "content": "w1"}, THOUGHT]}] * 2
    sentence = (
        r"train\.jsonl: 2 of 2 rows with reasoning in an answer lose it: the chat template cuts it "
        r"out \(first: .*train\.jsonl: line 1, 'because'\); .*, or train without it by --allow-lost"
    )
    for options in ({}, {"mask_prompt": True}, {"train_on": "answers"}):
        with pytest.raises(EdgeLoraError, match=sentence):
            load(tokenizer, folder(train=rows), **options)
        train, _, _ = load(tokenizer, folder(train=rows), allow_lost_content=True, **options)
        assert len(train) == 2 and train.report.findings.rows == 2


def test_which_answers_are_labels(tokenizer, folder):
    turns = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 2
    expected = {"answers": "w2 w3 </s> | w5 </s>", "last-answer": "w5 </s>", None: None}
    for train_on, text in expected.items():
        train, _, _ = load(tokenizer, folder(train=rows), train_on=train_on)
        tokens, spans = train[0]
        if text is not None:
            found = [tokenizer.decode(tokens[a:b].tolist()) for a, b in spans]
            assert " | ".join(found) == text
        else:
            assert spans.tolist() == [[1, len(tokens)]]
    train, _, _ = load(tokenizer, folder(train=rows), mask_prompt=True)
    (line,) = train.report.findings.lines()
    assert line.startswith("2 rows with several answers: only the last one is trained (first: ")
    assert line.endswith("; --train-on answers trains all")


def test_pieces_of_a_row_count_as_one_row(make_tokenizer, folder):
    """A template that cuts earlier answers short makes rows of them."""
    template = (
        "{% for m in messages %}<{{ m.role }}> {% if m.role == 'user' or loop.last %}"
        "{{ m.content }}{% endif %} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w4"), ("assistant", "w5")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    empty = {"messages": [{"role": "user", "content": "w1"}]}
    train, _, _ = load(
        make_tokenizer(template),
        folder(train=[*rows, empty, *rows]),
        train_on="answers",
        allow_lost_content=True,
    )
    assert len(train) == 4
    assert (train.report.rows, train.report.dropped) == (3, 1)
    assert [train.place(i)[-6:] for i in range(4)] == ["line 1", "line 1", "line 3", "line 3"]


def test_rows_without_any_answer_say_why(tokenizer, folder):
    rows = [{"messages": [{"role": "user", "content": "w1"}]}] * 3
    with pytest.raises(
        EdgeLoraError, match=r"none of its 3 rows has a token to train .*; 3 rows without an answer"
    ):
        load(tokenizer, folder(train=rows), train_on="answers")


def test_splits_of_the_hub_have_other_names_too(tokenizer, hub):
    hub.sets["someone/named"] = {"train": PAIRS, "validation": PAIRS[:4], "unsupervised": TEXT}
    lines = []
    train, valid, _ = load_datasets(
        TrainConfig(data="someone/named", batch_size=2), tokenizer, lines.append
    )
    assert (len(train), len(valid)) == (6, 4)
    assert lines == [
        "named train for training, named validation for validation: "
        "completions (prompt, completion)"
    ]
    with pytest.raises(
        EdgeLoraError, match=r"no test set, .* called test or testing, found train,"
    ):
        load(tokenizer, "someone/named", test=True)


def test_nulls_of_the_hub_are_missing_columns(tokenizer, hub):
    message = {"role": "user", "content": "w1", "tool_calls": None, "name": None}
    answer = message | {"role": "assistant", "content": "w2"}
    row = {"messages": [message, answer], "tools": None, "text": None}
    hub.sets["chats"] = {"train": [row] * 2}
    train, _, _ = load(tokenizer, "chats")
    assert lines(train, tokenizer)[0] == "<user> w1 </s> <assistant> w2 </s>"


def test_a_share_of_one_file_is_the_valid_set(tokenizer, tmp_path):
    rows = "text\n" + "".join(f"w{n} w1 w2\n" for n in range(20))
    (tmp_path / "rows.csv").write_text(rows)
    train, valid, _ = load(tokenizer, str(tmp_path / "rows.csv"), val_split=0.1)
    assert (len(train), len(valid)) == (18, 2)
    places = {part.place(i) for part in (train, valid) for i in range(len(part))}
    assert len(places) == 20
    assert "(2 of 20 rows, seed 0)" in valid.report.name
