"""Runs with losses of preferences: they learn, are resumed with the same bits, and report it."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny import make_model, run_options, words, write_rows
from training_helpers import EndsAt, silent

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.data.dataset import JUDGED, Dataset, Row
from mlx_edgelora.embedded import DEFAULT_CONFIG
from mlx_edgelora.planner.run_plan import plan_request
from mlx_edgelora.training import finetune as module
from mlx_edgelora.training.opening import adapted_model
from mlx_edgelora.training.resuming import fingerprints

PARTS = ("prompt", "chosen", "rejected")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model and pairs of different lengths."""
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()
    for split in ("train", "valid", "test"):
        rows = [
            {p: words(rng.integers(0, 100, rng.integers(1, 9))) for p in PARTS} for _ in range(7)
        ]
        write_rows(root / "data" / f"{split}.jsonl", rows)
    return root


@pytest.fixture
def options(tiny, tmp_path):
    """options(loss, **changes) -> a run on the tiny model."""

    def make(loss, **changes):
        common = run_options(tiny, tmp_path) | {
            "max_seq_length": TrainConfig.max_seq_length,
            "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.2},
            "learning_rate": 1e-3,
            "iters": 5,
            "grad_accumulation_steps": 2,
            "steps_per_report": 1,
            "save_every": 2,
            "verify": "off",
            "loss": loss,
        }
        return TrainConfig.from_dict(common | changes)

    return make


STREAMED = {"weights": "streamed", "activations": "spill", "adapters": "paged"}


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "place"), [("dpo", {}), ("kto", STREAMED), ("orpo", STREAMED)])
def test_a_resumed_run_ends_with_the_same_bits(options, tmp_path, loss, place):
    """The reference model is computed anew in every step, and has no state."""
    make = partial(options, loss, **place)
    finetune(make(adapter_path=str(tmp_path / "whole")), notify=silent)
    with pytest.raises(ZeroDivisionError):
        finetune(make(), [EndsAt(3)], notify=silent)
    finetune(make(resume=True), notify=silent)
    found, expected = (
        mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("adapters", "whole")
    )
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(np.array(found[name]), np.array(expected[name])), name


def test_reports_have_rewards(options, tmp_path, capsys):
    log, lines = tmp_path / "log.jsonl", []
    changes = {"log": str(log), "val_batches": -1, "steps_per_eval": 2, "test": True}
    finetune(options("simpo", iters=2, train=True, **changes), notify=lines.append)
    text = " ".join(" ".join(lines).split())
    assert " loss simpo, beta 2, gamma 0.5 " in text
    assert "7 pairs for training, 7 pairs for validation, 7 pairs for test" in text
    assert lines[-1].startswith("test loss ") and "reward margin" in lines[-1]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:7] == ["step", "train", "loss", "val", "loss", "margin", "accuracy"]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [record for record in records if "iteration" in record]
    assert sum("val_loss" in record for record in losses) == 2
    for record in losses:
        loss = record.get("train_loss", record.get("val_loss"))
        # The rewards of SimPO are what its convex loss compares.
        assert loss >= np.log1p(np.exp(0.5 - record["reward_margin"])) - 1e-6
        assert 0 <= record["accuracy"] <= 1
    (tested,) = [record["test"] for record in records if "test" in record]
    assert tested.keys() == {"loss", "tokens", "reward_margin", "accuracy"}


def own(**changes):
    """A run on the package's own preferences."""
    common = {"verify": "off", "val_batches": 0}
    finetune(TrainConfig.from_dict(read_yaml(DEFAULT_CONFIG) | common | changes), notify=silent)


def accuracy(adapter, folder):
    """Share of held-out pairs of which the chosen answer has the larger mean log-probability."""
    log = folder / "test.jsonl"
    changes = {"loss": "simpo", "train": False, "test": True, "test_batches": 4}
    own(log=str(log), adapter_path=adapter, **changes)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return next(record["test"] for record in records if "test" in record)["accuracy"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The accuracy of the package's base model."""
    return accuracy("", tmp_path_factory.mktemp("own"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo", "simpo", "kto"])
def test_the_packages_own_preferences_are_learned(loss, before, tmp_path):
    """The held-out pairs have names and places that training never saw."""
    folder = str(tmp_path / "adapters")
    own(loss=loss, iters=12, adapter_path=folder)
    assert before < 0.75
    assert accuracy(folder, tmp_path) > 0.95


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_batch_of_pairs_is_planned_with_both_rows(options, loss):
    """Parts of a batch hold whole pairs."""
    config = options(loss, batch_size=4, max_seq_length=33)
    folder, rows = Path(config.spill_dir), 8 if loss == "dpo" else 4
    request = plan_request(config, adapted_model(config), (), folder, folder)
    shape = request.batch_shape
    assert (shape.rows, shape.tokens, shape.labelled) == (rows, 32, rows * 32)
    parts = [shape.part(count).rows for count in (1, 2, 3, 4, 8)]
    assert parts == ([8, 4, 4, 2, 2] if loss == "dpo" else [4, 2, 2, 1, 1])
    assert request.smallest().plan.micro_batches <= 4


@pytest.mark.slow
def test_within_the_least_memory(options):
    found = finetune(options("dpo", memory_budget="min", iters=1), notify=silent)
    assert found.iterations == 1


def test_other_labels_are_other_data():
    """A run is not resumed with answers that were judged otherwise."""
    rows = [Row("a", 1, [1, 2, 3], 1, True), Row("a", 1, [1, 2, 4], 1, True)]
    others = [row._replace(is_desirable=False) for row in rows]
    files = SimpleNamespace(config={}, tensors={})
    first, second = (Dataset(some, 9, "a", preferences=JUDGED) for some in (rows, others))
    assert fingerprints(files, first)["data"] != fingerprints(files, second)["data"]


REFUSED = [
    ({"beta": 0.1}, "beta: got 0.1 with the exact loss, which has no use for it; leave it out"),
    ({"loss": "dpo", "simpo_gamma": 0.1}, "simpo_gamma: got 0.1 with the dpo loss.* to simpo"),
    ({"loss": "orpo", "desirable_weight": 2.0}, "desirable_weight: got 2.0 with the orpo loss"),
    ({"loss": "kto", "loss_k": 5}, "loss_k: got 5 with the kto loss.* set loss to approximate"),
    ({"loss": "dpo", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with the dpo loss"),
    ({"loss": "dpo", "packing": True}, "packing: got true with the dpo loss"),
    ({"loss": "dpo", "train_on": "everything"}, "train_on: got 'everything' with the dpo loss"),
    ({"loss": "dpo", "data_format": "chat"}, "data_format: got 'chat' with the dpo loss"),
    ({"loss": "dpo", "fine_tune_type": "dora"}, "fine_tune_type: got 'dora' with the dpo loss"),
    ({"loss": "kto", "train": False, "test": True, "adapter_path": ""}, "got no adapter to test"),
    ({"loss": "ipo"}, "loss: got 'ipo', expected one of exact, approximate, dpo, orpo, simpo, k"),
    ({"loss_type": "dpo"}, "loss_type: .*write loss: dpo, orpo, simpo or kto"),
]


@pytest.mark.parametrize(("mapping", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_options_that_do_not_fit_are_refused(mapping, sentence):
    with pytest.raises(EdgeLoraError, match=sentence):
        TrainConfig.from_dict(mapping)


def test_kto_in_several_processes_is_refused(options, monkeypatch):
    two = SimpleNamespace(size=2, leads=True, own_options=lambda config: config)
    monkeypatch.setattr(module.Group, "joined", lambda: two)
    with pytest.raises(EdgeLoraError, match=r"loss: got kto in a run of 2 processes, but it"):
        finetune(options("kto"), notify=silent)
