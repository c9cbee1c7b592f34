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
        ({"train": TEXT}, {"mask_prompt": True}, r"line 1: got a row with 'text', which has no"),
        ({"train": [{"q": "w1"}]}, {}, r"train\.jsonl: line 1: got the keys 'q', expected 'prompt"),
    ],
)
def test_bad_folders_are_refused(tokenizer, folder, splits, options, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        load(tokenizer, folder(**splits), **options)


def test_what_is_not_a_folder_is_told_apart(tokenizer, folder, tmp_path):
    folder(train=TEXT)
    with pytest.raises(EdgeLoraError, match=r"train\.jsonl is a file, expected the folder it is"):
        load(tokenizer, str(tmp_path / "train.jsonl"))
    with pytest.raises(EdgeLoraError, match=r"data: ./none does not exist, expected a folder with"):
        load(tokenizer, "./none")
    with pytest.raises(EdgeLoraError, match=r"data: a/b/c does not exist"):
        load(tokenizer, "a/b/c")
    with pytest.raises(EdgeLoraError, match=r"data: got nothing, expected a folder"):
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
