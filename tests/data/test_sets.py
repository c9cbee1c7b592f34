"""Which file is which set, what a share of the training rows is, and what a run is told."""

import json
from pathlib import Path

import pytest

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.conversation import PlainText
from mlx_edgelora.data.folder import find_files
from mlx_edgelora.data.sets import find_sets
from mlx_edgelora.errors import EdgeLoraError

TEXT = [{"text": f"w{n}"} for n in range(40)]
PAIRS = [{"question": f"w{n}", "answer": "w0"} for n in range(40)]


def write(folder, *names, rows=TEXT):
    for name in names:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".csv"):
            text = "text\n" + "".join(row["text"] + "\n" for row in rows)
        (folder / name).write_text(text)


def names(folder, wanted=("train", "valid", "test")):
    splits = find_files(folder, wanted).splits
    return {split: [path.name for path in paths] for split, paths in splits.items() if paths}


def texts(parts):
    return [row.text for part in parts for _, row in part.rows()]


def sets(data, **options):
    return find_sets(TrainConfig(data=str(data), **options))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["train.jsonl", "valid.jsonl", "test.jsonl"],
            ["train.jsonl", "valid.jsonl", "test.jsonl"],
        ),
        (["train.jsonl", "validation.jsonl"], ["train.jsonl", "validation.jsonl"]),
        (["train.csv", "dev.csv"], ["train.csv", "dev.csv"]),
        (["Training.JSONL", "VAL.json"], ["Training.JSONL", "VAL.json"]),
        (["train.parquet", "eval.tsv"], ["train.parquet", "eval.tsv"]),
        (
            ["train.txt", "evaluation.txt", "testing.txt"],
            ["train.txt", "evaluation.txt", "testing.txt"],
        ),
        (["train.jsonl.gz"], ["train.jsonl.gz"]),
        (["train.jsonl", "train.csv", "training.jsonl"], ["train.jsonl"]),  # mlx-lm's own first
        (["train.jsonl", ".valid.jsonl", "train.md"], ["train.jsonl"]),
        (
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.csv"],
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.csv"],
        ),
        (["validation-00000-of-00001.parquet"], ["validation-00000-of-00001.parquet"]),
    ],
)
def test_names_of_sets(tmp_path, files, expected):
    write(tmp_path, *files)
    assert [name for files in names(tmp_path).values() for name in files] == expected


def test_sets_that_could_be_several_files_are_refused(tmp_path):
    write(tmp_path, "train.csv", "train.json", "dev.jsonl", "val.jsonl")
    with pytest.raises(
        EdgeLoraError, match=r"several files for its train set, train\.csv, train\."
    ):
        find_files(tmp_path)
    with pytest.raises(
        EdgeLoraError, match=r"valid set, dev\.jsonl, val\.jsonl, .* call it valid\."
    ):
        find_files(tmp_path, ["valid"])
    assert names(tmp_path, ["test"]) == {}


def test_parts_that_are_missing_are_named(tmp_path):
    write(tmp_path, "train-00001-of-00002.parquet")
    with pytest.raises(EdgeLoraError, match=r"has 1 of the 2 parts of which train-00001-of-00002"):
        find_files(tmp_path)


def test_near_misses_are_named(tmp_path):
    write(tmp_path, "my_train.jsonl", "valid.jsonl", "._my_train.jsonl")
    (tmp_path / "README.md").write_text("")
    with pytest.raises(
        EdgeLoraError,
        match=r"has no train set, expected train\.jsonl in the folder "
        r"\(or train\.csv, training\.json, \.\.\.\), "
        r"found my_train\.jsonl$",
    ):
        sets(tmp_path)
    write(tmp_path, "train.jsonl", "val_data.jsonl")
    (tmp_path / "valid.jsonl").unlink()
    assert sets(tmp_path).about[1] == (
        "no valid set, so no validation (expected --val-split 0.05, or valid.jsonl in the folder "
        "(or valid.csv, validation.json, ...), found my_train.jsonl, val_data.jsonl)"
    )


def test_a_run_is_told_which_file_is_which_set_and_of_which_kind(tmp_path):
    write(tmp_path, "train.jsonl", "dev.csv")
    found = sets(tmp_path)
    assert found.about == ["train.jsonl for training, dev.csv for validation: text (text)"]
    assert texts(found.train) == texts(found.valid) == [row["text"] for row in TEXT]
    (tmp_path / "dev.csv").rename(tmp_path / "rows.csv")
    write(tmp_path, "valid.jsonl")
    assert sets(tmp_path).about == ["text (text)"]
    (tmp_path / "valid.jsonl").unlink()
    (tmp_path / "rows.csv").rename(tmp_path / "dev.csv")
    write(tmp_path, "train.jsonl", rows=PAIRS)
    assert sets(tmp_path).about == [
        "train.jsonl for training: qa (question, answer); dev.csv for validation: text (text)"
    ]


def test_one_file_is_the_training_set_or_what_is_tested(tmp_path):
    write(tmp_path, "rows.csv")
    found = sets(tmp_path / "rows.csv")
    assert (len(texts(found.train)), found.valid, found.test) == (40, [], [])
    assert "expected --val-split 0.05, or a folder with valid.jsonl" in found.about[1]
    tested = sets(tmp_path / "rows.csv", test=True)
    assert (tested.train, len(texts(tested.test))) == ([], 40)
    assert tested.about == ["rows.csv for the test: text (text)"]
    with pytest.raises(
        EdgeLoraError, match=r"has no test set, expected a folder .* one file is one"
    ):
        sets(tmp_path / "rows.csv", train=True, test=True)
    with pytest.raises(EdgeLoraError, match=r"other\.csv: cannot be read \(No such file"):
        sets(tmp_path / "other.csv")


def test_a_share_is_split_off_by_the_seed(tmp_path):
    write(tmp_path, "rows.jsonl")
    everything = {row["text"] for row in TEXT}
    drawn = {}
    for seed in (0, 1):
        found = sets(tmp_path / "rows.jsonl", val_split=0.1, seed=seed)
        train, valid = texts(found.train), texts(found.valid)
        assert (len(train), len(valid)) == (36, 4)
        assert set(train) | set(valid) == everything
        again = sets(tmp_path / "rows.jsonl", val_split=0.1, seed=seed)
        assert (texts(again.train), texts(again.valid)) == (train, valid)
        drawn[seed] = valid
    assert drawn[0] != drawn[1]
    assert found.about == [
        "rows.jsonl (without the valid set) for training, rows.jsonl (4 of 40 rows, seed 1) for "
        "validation: text (text)"
    ]
    assert len(texts(sets(tmp_path / "rows.jsonl", val_split=0.001).valid)) == 1


def test_a_share_of_nothing_or_beside_a_valid_set_is_refused(tmp_path):
    write(tmp_path, "train.jsonl", "val.jsonl")
    with pytest.raises(
        EdgeLoraError, match=r"val_split: got 0\.05, but there is a valid set, .*val\."
    ):
        sets(tmp_path, val_split=0.05)
    write(tmp_path, "one.jsonl", rows=TEXT[:1])
    with pytest.raises(EdgeLoraError, match=r"val_split: got 0\.05, but .*one\.jsonl has 1 rows"):
        sets(tmp_path / "one.jsonl", val_split=0.05)
    with pytest.raises(EdgeLoraError, match=r"val_split: got 0\.05 with val_batches 0"):
        sets(tmp_path, val_split=0.05, val_batches=0)
    with pytest.raises(EdgeLoraError, match=r"val_split: got 0\.05 with hf_dataset"):
        TrainConfig(val_split=0.05, hf_dataset={"path": "a/b"})


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    write(tmp_path, "rows.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(texts(sets("~/rows.jsonl").train)) == 40
    with pytest.raises(EdgeLoraError, match="data: ~/none does not exist"):
        sets("~/none")


def test_a_text_file_is_text_whatever_the_text_column_is_called(tmp_path):
    (tmp_path / "train.txt").write_text("one\ntwo\n")
    found = sets(tmp_path, text_feature="body")
    assert [row for _, row in found.train[0].rows()] == [PlainText("one"), PlainText("two")]
    with pytest.raises(
        EdgeLoraError, match=r"train\.txt: line 1: got the keys 'text', expected 'me"
    ):
        sets(tmp_path, data_format="chat")


def test_a_folder_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mlx_edgelora.data.folder.os.listdir", refuse)
    with pytest.raises(EdgeLoraError, match=r"cannot be read \(Permission denied\)"):
        find_files(Path(tmp_path))
