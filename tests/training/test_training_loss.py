"""The loss of a run: checked before long work, ready before the first step, exact in evaluation."""

import io
import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load
from tiny import LENGTH, VOCABULARY, make_data, make_model, run_options
from training_helpers import Recorder

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.data import iterate_batches, load_datasets
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.losses.head import Adapter, MatrixHead
from mlx_edgelora.losses.neighbours import nearest
from mlx_edgelora.model import neighbour_cache
from mlx_edgelora.model.neighbour_cache import NeighbourCache
from mlx_edgelora.training.training_loss import check_loss, training_loss

HEAD = MatrixHead(mx.random.normal((50, 8), key=mx.random.key(2)))
LABELS = np.array([3, 7, 8, 49], np.int32)
SET = SimpleNamespace(labels=lambda: LABELS)


def approximate(**options):
    return TrainConfig(loss="approximate", **options)


# --- checks -------------------------------------------------------------------------------


def test_what_fits_is_let_through():
    check_loss(approximate(), HEAD)
    check_loss(approximate(loss_k=50), HEAD)
    check_loss(TrainConfig(), None)
    check_loss(TrainConfig(label_smoothing=0.1), None)


def test_what_does_not_fit_the_head_is_refused():
    with pytest.raises(EdgeLoraError, match=r"^loss_k: got 51, expected 1 to 50, the model's voc"):
        check_loss(approximate(loss_k=51), HEAD)
    with pytest.raises(EdgeLoraError, match=r"^loss: got approximate, but its logits are not prod"):
        check_loss(approximate(), None)
    adapter = Adapter(mx.ones((2, 8)), mx.ones((50, 2)), 1.0)
    adapted = MatrixHead(mx.ones((50, 8)), adapter=adapter)
    with pytest.raises(EdgeLoraError, match=r"^loss: got approximate, but its head is adapted"):
        check_loss(approximate(), adapted)
    check_loss(approximate(train=False, test=True), adapted)  # a test is exact anyway


# --- the loss itself ----------------------------------------------------------------------


def test_exact_is_the_default_and_smooths(tmp_path):
    with training_loss(TrainConfig(label_smoothing=0.1), None, SET, tmp_path, pytest.fail) as loss:
        assert loss == CrossEntropy(label_smoothing=0.1)
    with training_loss(TrainConfig(), None, SET, tmp_path, pytest.fail) as loss:
        assert loss == CrossEntropy()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("corrected", [None, True, False])
@pytest.mark.parametrize("cap", [None, 9])
def test_approximate_is_what_its_options_say(tmp_path, corrected, cap):
    config = approximate(loss_k=5, loss_max_subset=cap, loss_tail_correction=corrected)
    hidden, labels = mx.random.normal((6, 8)), mx.array([3, 49, 7, 7, 8, 3])
    total = HEAD.unpack(HEAD.slice(0, 50)).weight.sum(axis=0, keepdims=True)
    reference = ApproximateCrossEntropy(
        lambda tokens: np.array(nearest(HEAD, mx.array(tokens), 5)),
        cap,
        None if corrected is False else SimpleNamespace(weight=total, bias=mx.zeros((1,))),
    )
    with training_loss(config, HEAD, SET, tmp_path, lambda line: None) as loss:
        assert type(loss) is ApproximateCrossEntropy
        got, expected = (each.value(hidden, HEAD, labels)[0] for each in (loss, reference))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    subset = len(reference.restrict(hidden, HEAD, labels)[1])
    assert subset <= 9 if cap else subset


def logged_lines(folder, **options):
    """The lines that a run gets before it trains."""
    lines = []
    with training_loss(approximate(**options), HEAD, SET, folder, lines.append) as loss:
        assert loss.neighbours.missing(LABELS).size == 0
        path = loss.neighbours.path
    return lines, path


def test_lines_say_what_is_done_before_it_is_done(tmp_path, capsys):
    lines, path = logged_lines(tmp_path, loss_k=5)
    assert lines == [
        f"nearest tokens: 4 of 4 labels to compute, kept in {path} for the next run",
        "approximate loss over the 5 nearest tokens of each label, with tail correction",
    ]
    lines, _ = logged_lines(tmp_path, loss_k=5, loss_tail_correction=False)
    assert lines == [
        f"nearest tokens: all of 4 labels are in {path}",
        "approximate loss over the 5 nearest tokens of each label, without tail correction",
    ]
    assert capsys.readouterr() == ("", "")  # a live line is for terminals


def test_the_default_k_is_1000_or_the_whole_vocabulary(tmp_path):
    assert "over the 50 nearest tokens" in logged_lines(tmp_path)[0][-1]
    large = MatrixHead(mx.random.normal((1500, 8)))
    with training_loss(approximate(), large, SET, tmp_path, lambda line: None) as loss:
        assert loss.neighbours(LABELS).shape == (4, 1000)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(neighbour_cache, "SLOTS_BYTES", 1)
    logged_lines(tmp_path, loss_k=5)
    shown = screen.getvalue()
    assert "nearest tokens" in shown
    assert "0/4" in shown and "4/4" in shown
    logged_lines(tmp_path, loss_k=5)
    assert screen.getvalue() == shown  # nothing to wait for


@pytest.mark.parametrize("moment", ["build", "use"])
def test_the_file_is_closed_whatever_happens(tmp_path, monkeypatch, moment):
    closed = []
    close = NeighbourCache.close
    monkeypatch.setattr(
        NeighbourCache, "close", lambda self: closed.append(close(self)) or closed[-1]
    )
    if moment == "build":
        monkeypatch.setattr(neighbour_cache, "nearest", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        training_loss(approximate(), HEAD, SET, tmp_path, lambda line: None),
    ):
        interrupted()
    assert closed == [None]


def interrupted(*_):
    raise KeyboardInterrupt


# --- whole runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model")
    make_data(root / "data", rows=12)
    return root


@pytest.fixture
def options(tiny, tmp_path):
    """options(**changes) -> a run of two steps with the approximate loss."""

    def make(**changes):
        settings = (
            run_options(tiny, tmp_path)
            | {
                "overwrite": True,
                "cache_dir": str(tmp_path / "cache"),
                "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0},
                "batch_size": 3,
                "learning_rate": 1e-2,
                "steps_per_report": 1,
                "steps_per_eval": 2,
                "val_batches": -1,
                "kernel": "dequantize",
                "loss": "approximate",
            }
            | changes
        )
        return TrainConfig.from_dict(settings)

    return make


def run(config):
    """Train; returns training losses, validation losses and what was told."""
    recorder, lines = Recorder(), []
    finetune(config, [recorder], lines.append)
    train = [report["train_loss"] for report in recorder.train]
    return train, [report["val_loss"] for report in recorder.val], lines


def logits_and_labels(model, batch):
    """In float64: [n, vocabulary] and [n]."""
    logits = np.array(model(mx.array(batch.inputs())).astype(mx.float32), np.float64)
    return logits.reshape(-1, VOCABULARY), batch.labels().reshape(-1)


def mean_loss(logits, places):
    peak = logits.max(axis=1, keepdims=True)
    logs = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
    return (logs - logits[np.arange(len(places)), places]).mean()


def approximate_loss(model, batch, k, corrected):
    """The definition, on the logits of mlx-lm's own model."""
    logits, labels = logits_and_labels(model, batch)
    table = model.model.embed_tokens
    weight = mx.dequantize(
        table.weight, table.scales, table.biases, table.group_size, table.bits, table.mode
    )
    weight = np.array(weight, np.float64)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    subset = np.unique(np.argsort(-(weight[labels] @ weight.T), axis=1)[:, :k])
    rest = np.setdiff1d(np.arange(VOCABULARY), subset)
    assert len(rest) > 10
    columns = logits[:, subset]
    if corrected:
        mean = logits[:, rest].mean(axis=1, keepdims=True)  # the mean row gives the mean logit
        columns = np.hstack([columns, mean + np.log(len(rest))])
    return mean_loss(columns, np.searchsorted(subset, labels))


def batches(config):
    """The first one of training, and those of validation and test, as the run draws them."""
    train_set, valid_set, test_set = load_datasets(config, load(config.model)[1])
    first = next(iterate_batches(train_set, 3, LENGTH, seed=config.seed))
    return first, *(
        list(iterate_batches(rows, 3, LENGTH, loop=False, seed=config.seed))
        for rows in (valid_set, test_set)
    )


def exact_loss(model, some):
    """All rows have as many labels, so the mean of means is the mean."""
    return np.mean([mean_loss(*logits_and_labels(model, batch)) for batch in some])


@pytest.mark.parametrize("weights", ["streamed", "resident"])
@pytest.mark.parametrize("corrected", [True, False])
def test_training_is_approximate_and_evaluation_exact(options, tmp_path, corrected, weights):
    how = {"loss_k": 2, "loss_tail_correction": corrected, "weights": weights}
    config = options(**how, train=True, test=True, save_every=1)
    train, val, lines = run(config)
    base, _ = load(config.model)
    first, valid, test = batches(config)
    assert train[0] == pytest.approx(approximate_loss(base, first, 2, corrected), rel=1e-5)
    assert train[0] < exact_loss(base, [first]) - 1e-3
    trained, _ = load(config.model, adapter_path=str(tmp_path / "adapters"))
    assert lines[-1].startswith(f"test loss {exact_loss(trained, test):.3f}, perplexity")
    trained.load_weights(str(tmp_path / "adapters/0000001_adapters.safetensors"), strict=False)
    assert val == pytest.approx([exact_loss(base, valid), exact_loss(trained, valid)], rel=1e-5)
    assert abs(val[1] - val[0]) > 1e-3
    alone = run(options(train=False, test=True))[2]
    assert alone[-1] == lines[-1]
    assert not any("nearest tokens" in line for line in alone)


def test_the_whole_vocabulary_trains_as_the_exact_loss_does(options, tmp_path):
    got = run(options(loss_k=VOCABULARY))[:2]
    adapter = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    expected = run(options(loss="exact"))[:2]
    assert np.ravel(got) == pytest.approx(np.ravel(expected), rel=1e-6)
    exact = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    for name, value in exact.items():
        error = mx.linalg.norm((adapter[name] - value).reshape(-1)).item()
        assert error <= 1e-4 * mx.linalg.norm(value.reshape(-1)).item(), name


def test_the_second_run_computes_no_neighbours_and_trains_the_same(options, tmp_path, monkeypatch):
    train, val, lines = run(options(loss_k=3))
    (path,) = (tmp_path / "cache").iterdir()
    labels = np.unique([t for b in all_train_batches(options()) for t in b.labels().ravel()])
    assert f"nearest tokens: {len(labels)} of {len(labels)} labels to compute" in " ".join(lines)
    before = path.read_bytes()
    for name in ("nearest", "row_sum"):
        monkeypatch.setattr(neighbour_cache, name, lambda *_: pytest.fail("computed again"))
    again = run(options(loss_k=3))
    assert again[:2] == (train, val)
    assert f"nearest tokens: all of {len(labels)} labels are in {path}" in again[2]
    assert path.read_bytes() == before


def all_train_batches(config):
    train_set, _, _ = load_datasets(config, load(config.model)[1])
    return iterate_batches(train_set, 3, LENGTH, loop=False)


def test_a_damaged_file_is_replaced_and_nothing_changes(options, tmp_path):
    train, val, _ = run(options(loss_k=3))
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    again = run(options(loss_k=3))
    assert again[:2] == (train, val)
    size = path.stat().st_size
    assert f"{path}: {size - 1} bytes long, expected {size}; it is rebuilt" in again[2]


@pytest.mark.parametrize("cap", [1, 20])
def test_a_cap_changes_the_loss(options, cap):
    free, _, _ = run(options(loss_k=20, loss_tail_correction=False))
    capped, _, _ = run(options(loss_k=20, loss_tail_correction=False, loss_max_subset=cap))
    assert capped[0] < free[0] - 1e-3  # fewer tokens, less mass


def test_the_options_are_kept_with_the_adapter(options, tmp_path):
    run(options(loss_k=3, loss_max_subset=90))
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (saved["loss"], saved["loss_k"], saved["loss_max_subset"]) == ("approximate", 3, 90)
