"""Rows of preferences: what is read, which tokens are labelled, batches, and what bad rows get."""

import numpy as np
import pytest

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import load_datasets
from mlx_edgelora.data.batches import count_batches, iterate_batches, largest_batch, padding_share
from mlx_edgelora.data.sets import find_sets
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.evaluation.rows import asked_rows
from mlx_edgelora.preview import facts

USER = {"role": "user", "content": "w1"}


def said(text):
    return {"role": "assistant", "content": text}


def pair(prompt="w1", chosen="w2 w3", rejected="w4"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def judged(prompt, completion, label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


@pytest.fixture
def load(tokenizer, folder):
    """load(rows, loss) -> the training set of these rows."""

    def call(rows, loss="dpo", **options):
        config = TrainConfig(data=folder(train=rows), val_batches=0, loss=loss, **options)
        return load_datasets(config, tokenizer)[0]

    return call


def shown(dataset, tokenizer):
    """Of each row its text, with the labels after a bar."""
    texts = []
    for tokens, spans in dataset:
        ((start, stop),) = spans.tolist()
        assert stop == len(tokens)
        parts = tokens[:start].tolist(), tokens[start:].tolist()
        texts.append("|".join(tokenizer.decode(part).strip() for part in parts))
    return texts


CHOSEN = "<user> w1 </s> <assistant>|w2 w3 </s>"
REJECTED = "<user> w1 </s> <assistant>|w4 </s>"


@pytest.mark.parametrize(
    "row",
    [
        pair(),
        pair(prompt=[USER], chosen=[said("w2 w3")], rejected=[said("w4")]),
        pair(chosen=said("w2 w3"), rejected=said("w4")),
        {"chosen": [USER, said("w2 w3")], "rejected": [USER, said("w4")]},
        pair(chosen=[USER, said("w2 w3")], rejected=[USER, said("w4")]),  # the prompt is repeated
        {"Prompt": "w1", "Chosen": "w2 w3", "Rejected": "w4", "id": 3},
    ],
    ids=["text", "messages", "message", "implicit prompt", "repeated prompt", "other spelling"],
)
def test_a_pair_is_two_rows_whose_answers_are_labelled(row, load, tokenizer):
    dataset = load([row, row])
    assert shown(dataset, tokenizer) == [CHOSEN, REJECTED] * 2
    assert [dataset.judgement(index) for index in range(4)] == ["chosen", "rejected"] * 2
    assert (dataset.examples, dataset.report.rows) == (2, 2)
    assert dataset.place(3).endswith("train.jsonl: line 2")


def test_of_conversations_only_what_differs_is_compared(load, tokenizer):
    turns = [USER, said("w5"), {"role": "user", "content": "w6"}]
    row = {"chosen": [*turns, said("w7")], "rejected": [*turns, said("w8 w9")]}
    start = "<user> w1 </s> <assistant> w5 </s> <user> w6 </s> <assistant>|"
    assert shown(load([row]), tokenizer) == [f"{start}w7 </s>", f"{start}w8 w9 </s>"]


def test_judged_answers_come_with_an_answer_to_another_prompt(load, tokenizer):
    """The next prompt that is another one; at the end the first."""
    rows = [
        judged("w1", "w11"),
        judged("w1", "w12", False),
        judged("w2", "w13", "False"),
        judged("w3", "w14 w15", True),
    ]
    dataset = load(rows, "kto")
    texts = shown(dataset, tokenizer)
    texts = [text.replace(" </s>", "").replace("<assistant>", "") for text in texts]
    assert texts == [
        "<user> w1 |w11",
        "<user> w1 |w13",
        "<user> w1 |w12",
        "<user> w1 |w13",
        "<user> w2 |w13",
        "<user> w2 |w14 w15",
        "<user> w3 |w14 w15",
        "<user> w3 |w11",
    ]
    assert [dataset.is_desirable(2 * i) for i in range(4)] == [True, False, False, True]
    assert (dataset.examples, dataset.report.rows) == (4, 4)


def test_kto_reads_pairs_as_two_judged_answers(load, tokenizer):
    dataset = load([pair(), pair("w5", "w6", "w7")], "kto")
    assert dataset.examples == 4
    assert [dataset.judgement(2 * i) for i in range(4)] == ["desirable", "undesirable"] * 2
    texts = shown(dataset, tokenizer)
    assert texts[0] == CHOSEN
    assert texts[1].endswith("w1 </s> <assistant>|w6 </s>")
    assert texts[3].endswith("w1 </s> <assistant>|w7 </s>")


def test_a_pair_is_dropped_if_one_answer_is_cut_off(load):
    rows = [pair(), pair("w1 w2 w3 w4 w5"), pair(chosen="w1 w2 w3 w4 w5 w6")]
    dataset = load(rows, max_seq_length=7)
    assert [dataset.place(2 * i)[-1] for i in range(dataset.examples)] == ["1", "3"]
    report = dataset.report
    assert (report.rows, report.dropped, report.truncated) == (3, 1, 1)
    assert report.longest == 11


def test_a_pair_is_dropped_if_one_answer_is_not_to_be_trained(load, tokenizer):
    untrained = {"role": "assistant", "content": "w9", "weight": 0}
    dataset = load([pair(rejected=untrained), pair()])
    assert shown(dataset, tokenizer) == [CHOSEN, REJECTED]
    assert (dataset.report.rows, dataset.report.dropped) == (2, 1)


def test_batches_hold_both_answers_of_a_pair(load):
    rows = [pair(f"w{n}", " ".join(["w9"] * (1 + n % 4)), f"w{n} w8 w8") for n in range(10)]
    dataset = load(rows)
    batches = list(iterate_batches(dataset, 4, 2048, seed=1))
    assert [batch.terms for batch in batches] == [len(batch.tokens) // 2 for batch in batches]
    assert sorted(batch.terms for batch in batches) == [2, 4, 4]
    assert sorted(index for batch in batches for index in batch.indices) == list(range(20))
    for batch in batches:
        indices = np.array(batch.indices).reshape(-1, 2)
        assert (indices[:, 0] % 2 == 0).all() and (indices[:, 1] == indices[:, 0] + 1).all()
        assert batch.preferences.desirable.tolist() == [True, False] * batch.terms
        assert batch.preferences.mismatched is None
    assert count_batches(dataset, 4, 2048, epochs=2) == 6
    sizes = largest_batch([dataset], 4, 2048)
    assert sizes.rows == max(len(batch.tokens) for batch in batches) == 8
    assert sizes.tokens == max(batch.inputs().shape[1] for batch in batches)
    assert sizes.labels >= max(batch.mask.sum() for batch in batches)
    tokens = sum(batch.tokens.size for batch in batches)
    assert padding_share(dataset, 4, 2048, seed=1) == pytest.approx(
        1 - sum(len(tokens) for tokens, _ in dataset) / tokens
    )


def test_batches_of_judged_answers_hold_the_others_apart(load):
    rows = [judged(f"w{n}", " ".join(["w9"] * (1 + n % 4)), n % 3 == 0) for n in range(7)]
    dataset = load(rows, "kto")
    for batch in iterate_batches(dataset, 3, 2048, seed=1):
        known = batch.preferences
        assert batch.terms == len(batch.tokens) == len(known.mismatched.tokens)
        assert all(index % 2 == 0 for index in batch.indices)
        assert known.mismatched.indices == tuple(index + 1 for index in batch.indices)
        assert known.desirable.tolist() == [index // 2 % 3 == 0 for index in batch.indices]
    assert largest_batch([dataset], 3, 2048).rows == 3


BAD = {
    "missing": ({"prompt": "w1", "chosen": "w2"}, "got the keys 'prompt', 'chosen', expected 'r"),
    "null": (pair(rejected=None), "rejected: got None, expected an answer"),
    "number": (pair(rejected=5), "rejected: got 5, expected text"),
    "empty": (pair(chosen=" "), "chosen: got an empty answer, expected text"),
    "equal": (pair(rejected="w2 w3"), "chosen and rejected are the same answer, expected two diff"),
    "equal tokens": (pair(rejected=" w2  w3"), "chosen and rejected become the same tokens"),
    "no answer": (
        {"chosen": [USER, said("w2")], "rejected": [USER]},
        "rejected: has no answer behind the prompt",
    ),
    "other prompts": (
        {"chosen": [USER, said("w2")], "rejected": [{"role": "user", "content": "w9"}, said("w2")]},
        "begin with different messages, expected two conversations with the same prompt",
    ),
    "no prompt": ({"chosen": "w2", "rejected": "w3"}, "chosen: got text without a prompt"),
    "user": (
        pair(prompt=[USER], chosen=[USER], rejected=[said("w2")]),
        "chosen: its answer begins with a message of the user",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named_by_file_and_line(name, load):
    row, sentence = BAD[name]
    good = (
        pair()
        if "prompt" in row
        else {"chosen": [USER, said("w2")], "rejected": [USER, said("w3")]}
    )
    with pytest.raises(EdgeLoraError, match=rf"train\.jsonl: line 3: .*{sentence}"):
        load([good, good, row])


@pytest.mark.parametrize("label", [1, None, "good", 0.5])
def test_a_label_is_true_or_false(label, load):
    with pytest.raises(
        EdgeLoraError, match=r"line 2: label: got .*, expected true for a desirable"
    ):
        load([judged("w1", "w2"), judged("w3", "w4", label)], "kto")


def test_rows_of_another_kind_name_the_loss_for_them(load):
    with pytest.raises(EdgeLoraError, match=r"expected 'chosen' and 'rejected'; train on judged a"):
        load([judged("w1", "w2")])
    with pytest.raises(EdgeLoraError, match=r"train on pairs of answers with --loss dpo, orpo"):
        load([pair()], "exact")
    with pytest.raises(EdgeLoraError, match=r"expected 'prompt' and 'completion' and 'label', or"):
        load([{"text": "w1"}], "kto")
    with pytest.raises(EdgeLoraError, match=r"text_feature and chat_feature name columns that"):
        load([pair()], text_feature="t")


def test_one_prompt_is_too_few_for_kto(load):
    with pytest.raises(EdgeLoraError, match=r"line 1: all rows have the same prompt, but kto"):
        load([judged("w1", "w2"), judged("w1", "w3")], "kto")


def test_the_preview_shows_both_answers_and_counts_pairs(load):
    dataset = load([pair(), pair(rejected="w5"), pair()])
    assert facts.duplicates(dataset) == 1
    titles = [facts.title(dataset, index) for index in dataset.rows_of(1)]
    assert titles == [f"{dataset.place(2)}, chosen", f"{dataset.place(2)}, rejected"]
    assert len(facts.lengths_of(dataset)) == 6
    assert facts.duplicates(load([judged("w1", "w2"), judged("w3", "w2", False)], "kto")) == 0


def test_prompts_to_ask_are_those_of_pairs(tokenizer, folder):
    config = TrainConfig(data=folder(train=[pair()]), val_batches=0, loss="dpo")
    (row,) = asked_rows(find_sets(config).train, 2)
    assert (row.messages, row.expected) == ([USER], "w2 w3")
