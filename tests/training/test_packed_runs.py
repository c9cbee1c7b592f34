"""Whole runs over rows of several lengths: epochs, remainders, rows that share rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model, words, write_rows

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.data.batches import iterate_batches
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.training import loop
from mlx_edgelora.training.inspecting import plan_report
from mlx_edgelora.training.opening import open_engine
from mlx_edgelora.training.rehearsal import synthetic_batch

LENGTHS = [5, 9, 3, 30, 6, 4, 8, 12, 7, 5, 3, 21, 6]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model", quantized=False)
    make_model(root / "recurrent", "qwen3_next", quantized=False)
    (root / "data").mkdir()
    random = np.random.default_rng(0)
    texts = [words(random.integers(0, 100, length)) for length in LENGTHS]
    write_rows(root / "data/train.jsonl", [{"text": text} for text in texts])
    write_rows(root / "data/valid.jsonl", [{"text": text} for text in texts[:2]])
    return root


@pytest.fixture
def options(tiny, tmp_path):
    def make(**changes):
        settings = {
            "model": str(tiny / "model"),
            "data": str(tiny / "data"),
            "adapter_path": str(tmp_path / "adapters"),
            "spill_dir": str(tmp_path),
            "num_layers": -1,
            "batch_size": 4,
            "epochs": 2,
            "max_seq_length": 40,
            "save_every": 1000,
        }
        return TrainConfig.from_dict(settings | changes)

    return make


def run(config, monkeypatch):
    """The batches that were trained on, the result, and what was told."""
    batches, lines = [], []
    step = loop._Run.step
    monkeypatch.setattr(loop._Run, "step", lambda *args: (batches.append(args[2]), step(*args)))
    result = finetune(config, notify=lines.append)
    monkeypatch.undo()
    return batches, result, "\n".join(lines)


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_train_every_row_once_each(options, monkeypatch, packing):
    batches, result, told = run(options(packing=packing), monkeypatch)
    assert result.iterations == len(batches)
    assert sorted(i for b in batches for i in b.indices) == sorted([*range(len(LENGTHS))] * 2)
    assert result.trained_tokens == 2 * sum(LENGTHS)  # the end of a text is one more token
    assert np.isfinite(result.val_loss)
    saved = json.loads((Path(result.adapter_path) / "adapter_config.json").read_text())
    assert (saved["iters"], saved["epochs"], saved["packing"]) == (len(batches), None, packing)
    assert f"{len(batches)} steps of" in told
    if packing:
        assert len(batches) == 2 and all(batch.starts is not None for batch in batches)
        assert "batches    1 an epoch, of 4 rows of 40 tokens that short rows share" in told
    else:
        assert len(batches) == 8
        assert "batches    4 an epoch, of 4 rows;" in told
        assert "packing    rows are short: with --packing an epoch has 1 batches" in told


def test_what_mixes_rows_is_refused_before_a_step(options, tiny):
    config = options(model=str(tiny / "recurrent"), packing=True)
    with pytest.raises(EdgeLoraError, match=r"^packing: qwen3_next mixes rows"):
        finetune(config, notify=lambda line: None)
    lines = []
    finetune(options(model=str(tiny / "recurrent"), epochs=1), notify=lines.append)
    assert "packing" not in "\n".join(lines)  # no advice that would be refused


def test_a_budget_that_has_blocks_computed_in_tiles(options, monkeypatch):
    told = run(options(packing=True, memory_budget="min"), monkeypatch)[2]
    assert "disk" in told
    assert "equal" in told


def test_losses_are_those_of_rows_by_themselves(options):
    """Over an epoch, without a step between."""
    with open_engine(options(packing=True), lambda line: None) as (engine, _, vocabulary):
        random = np.random.RandomState(0)
        rows = [(random.randint(0, vocabulary, n).tolist(), 0) for n in LENGTHS]
        sums = []
        for packing in (False, True):
            losses = [
                (loss.item() * count, count)
                for loss, count in (
                    engine.loss(batch)
                    for batch in iterate_batches(rows, 3, 40, seed=1, packing=packing)
                )
            ]
            sums.append([sum(column) for column in zip(*losses, strict=True)])
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)


def test_the_plan_knows_that_rows_are_short(options):
    packed, alone = (plan_report(options(packing=packing)) for packing in (True, False))
    load = json.loads(packed.json())["batch"]
    assert load["rows"] == 4 and load["tokens"] == 39 and 0 < load["context"] < 40
    assert "in rows of about" in packed.table() and "in rows of about" not in alone.table()
    batch = synthetic_batch(BatchShape(2, 39, 30, context=10), 50)
    assert (batch.starts[:, 9:12] == [0, 10, 10]).all()
