import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner import trainer
from training_helpers import (
    PlainEngine,
    Recorder,
    load_adapter_weights,
    make_model,
    make_rows,
    record_keys,
)

from mlx_edgelora.data.batches import iterate_batches
from mlx_edgelora.data.dataset import Dataset, Row
from mlx_edgelora.engine.optimizer import build_optimizer
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import reset_peak
from mlx_edgelora.training.evaluate import evaluate
from mlx_edgelora.training.log import RunLog
from mlx_edgelora.training.loop import TrainResult, train

WEIGHTS = "adapters.safetensors"


def run(config, progress, rows=None, valid=None, model=None, engine=None, callbacks=(), log=None):
    engine = engine or PlainEngine(model or make_model())
    rows = rows or make_rows(8, 16)
    optimizer = build_optimizer(config)
    return engine, train(engine, optimizer, config, rows, valid, callbacks, progress, log=log)


def parameters(model):
    return dict(tree_flatten(model.trainable_parameters()))


def on_disk(config, model, name=WEIGHTS):
    shapes = {key: array.shape for key, array in parameters(model).items()}
    return load_adapter_weights(Path(config.adapter_path) / name, shapes)


def same(left, right):
    return left.keys() == right.keys() and all(mx.array_equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_of_mlx_lm_over_20_steps(make_config, quiet, tmp_path, accumulation):
    config = make_config(
        iters=20, batch_size=2, seed=3, grad_accumulation_steps=accumulation, learning_rate=1e-2
    )
    rows = make_rows(16, config.max_seq_length)
    theirs, ours = Recorder(), Recorder()
    model = make_model()
    np.random.seed(config.seed)
    trainer.train(
        model,
        build_optimizer(config),
        rows,
        args=trainer.TrainingArgs(
            batch_size=2,
            iters=20,
            steps_per_report=1,
            max_seq_length=config.max_seq_length,
            grad_accumulation_steps=accumulation,
            adapter_file=str(tmp_path / WEIGHTS),
        ),
        training_callback=theirs,
    )
    engine, _ = run(config, quiet, rows, callbacks=[ours])
    expected = [info["train_loss"] for info in theirs.train]
    losses = [info["train_loss"] for info in ours.train]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05  # and it did train
    for key in theirs.train[-1].keys() - {"peak_memory"}:
        if "second" not in key:
            assert ours.train[-1][key] == pytest.approx(theirs.train[-1][key], rel=1e-5), key
    assert theirs.train[0].keys() <= ours.train[0].keys()
    for name, array in parameters(model).items():
        assert mx.allclose(parameters(engine.model)[name], array, rtol=1e-3, atol=1e-5), name


def test_reports_and_validations_come_when_mlx_lm_has_them(make_config, quiet, tmp_path):
    config = make_config(iters=7, steps_per_report=3, steps_per_eval=2)
    rows, valid = make_rows(8, 16), make_rows(4, 16, seed=1)
    theirs, ours = Recorder(), Recorder()
    trainer.train(
        make_model(),
        build_optimizer(config),
        rows,
        valid,
        args=trainer.TrainingArgs(
            batch_size=2,
            iters=7,
            steps_per_report=3,
            steps_per_eval=2,
            max_seq_length=16,
            adapter_file=str(tmp_path / WEIGHTS),
        ),
        training_callback=theirs,
    )
    run(config, quiet, rows, valid, callbacks=[ours])
    for kind in ("train", "val"):
        expected = [info["iteration"] for info in getattr(theirs, kind)]
        assert [info["iteration"] for info in getattr(ours, kind)] == expected
    assert ours.val[0]["val_loss"] == pytest.approx(theirs.val[0]["val_loss"], rel=1e-5)
    assert theirs.val[0].keys() <= ours.val[0].keys()


@pytest.mark.parametrize(("valid", "batches"), [(None, -1), ([], -1), (make_rows(4, 16), 0)])
def test_no_validation_without_rows_or_batches(make_config, quiet, valid, batches):
    _, result = run(make_config(iters=1, val_batches=batches), quiet, valid=valid)
    assert result.val_loss is None


def test_train_loss_is_the_mean_over_tokens(make_config, quiet):
    # One long and one short batch per epoch, no learning: the report is the exact mean.
    config = make_config(iters=2, steps_per_report=2, learning_rate=1e-30, batch_size=1)
    rows, recorder = make_rows(2, [16, 3]), Recorder()
    engine, result = run(config, quiet, rows, callbacks=[recorder])
    expected, tokens = evaluate(engine, rows, config, -1)
    assert tokens == 17
    assert result.train_loss == pytest.approx(expected, rel=1e-6)
    assert result.trained_tokens == recorder.train[-1]["trained_tokens"] == 17


def test_evaluate_is_exact_repeatable_and_limited(make_config):
    config = make_config(batch_size=2)
    rows, engine = make_rows(6, [4, 4, 9, 9, 16, 16]), PlainEngine(make_model())
    batches = list(iterate_batches(rows, 2, 16, loop=False, seed=0))
    losses = [(engine.loss(batch)[0].item(), int(batch.mask.sum())) for batch in batches]
    for count in (-1, 1, 2, 99):
        part = losses if count == -1 else losses[:count]
        tokens = sum(number for _, number in part)
        expected = sum(loss * number for loss, number in part) / tokens
        calls = []
        got = evaluate(engine, rows, config, count, advance=lambda calls=calls: calls.append(1))
        assert got == (pytest.approx(expected, rel=1e-9), tokens)
        assert len(calls) == len(part)


def test_validation_has_no_dropout_and_training_keeps_it(make_config, quiet):
    model = make_model(dropout=0.5)
    model.update(tree_map(lambda p: p + 0.3, model.trainable_parameters()))
    engine, seen = PlainEngine(model), []
    plain = engine.value_and_grad
    engine.value_and_grad = lambda batch: (seen.append(model.training), plain(batch))[1]
    recorder = Recorder()
    config = make_config(iters=3, steps_per_eval=1, learning_rate=1e-30)
    model.eval()
    run(config, quiet, valid=make_rows(4, 16), engine=engine, callbacks=[recorder])
    assert len({info["val_loss"] for info in recorder.val}) == 1
    assert seen == [True] * 3


@pytest.mark.parametrize(("iters", "last"), [(4, 1), (5, 2), (6, 3)])
def test_the_remainder_of_accumulation_is_applied_as_its_own_mean(make_config, quiet, iters, last):
    steps = 3
    config = make_config(iters=iters, grad_accumulation_steps=steps, optimizer="sgd", batch_size=1)
    rows = make_rows(8, 16)
    reference = PlainEngine(make_model())
    optimizer = build_optimizer(config)
    batches = list(iterate_batches(rows, 1, 16, loop=False, seed=0))[:iters]
    while batches:
        group, batches = batches[:steps], batches[steps:]
        trees = [reference.value_and_grad(batch)[1] for batch in group]
        mean = tree_map(lambda *leaves: sum(leaves) / len(leaves), *trees)
        optimizer.update(reference.model, mean)
        mx.eval(reference.model.parameters())
    assert len(group) == last
    engine, _ = run(config, quiet, rows)
    for name, array in parameters(reference.model).items():
        assert mx.allclose(parameters(engine.model)[name], array, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("clipped", [None, 0.05])
def test_batches_whose_gradients_are_accumulated_count_by_their_labels(make_config, quiet, clipped):
    """They are one batch of all their rows; mlx-lm lets a batch of three labels count as much."""
    options = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": clipped}
    rows, found = make_rows(5, [16, 3, 9, 4, 13]), []
    for size, steps in ((5, 1), (1, 5), (2, 3)):
        config = make_config(batch_size=size, grad_accumulation_steps=steps, iters=steps, **options)
        engine, _ = run(config, quiet, rows)
        found.append(parameters(engine.model))
    for other in found[1:]:
        for name, array in found[0].items():
            assert mx.allclose(other[name], array, rtol=1e-4, atol=1e-7), name
    reference = PlainEngine(make_model())
    trees = [reference.value_and_grad(batch)[1] for batch in iterate_batches(rows, 1, 16)]
    mean = tree_map(lambda *leaves: sum(leaves) / len(leaves), *trees)
    build_optimizer(config).update(reference.model, mean)
    theirs = parameters(reference.model)
    assert not all(mx.allclose(theirs[n], found[0][n], rtol=1e-2, atol=1e-5) for n in theirs)


def test_a_set_smaller_than_a_batch_is_trained_and_validated(make_config, quiet):
    config, recorder = make_config(batch_size=8, iters=3, steps_per_eval=1), Recorder()
    rows, valid = make_rows(3, [16, 9, 4]), make_rows(2, [5, 7], seed=1)
    _, result = run(config, quiet, rows, valid, callbacks=[recorder])
    assert result.trained_tokens == 3 * (15 + 8 + 3)
    assert len(recorder.val) == 3 and all(np.isfinite(info["val_loss"]) for info in recorder.val)


def test_every_row_is_validated_and_counts_by_its_labels(make_config):
    engine, rows = PlainEngine(make_model()), make_rows(7, [4, 4, 9, 9, 16, 16, 12])
    config = make_config(batch_size=3)
    loss, tokens = evaluate(engine, rows, config, -1)
    (whole,) = iterate_batches(rows, 7, 16)
    expected, count = engine.loss(whole)
    assert tokens == count == 63
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_saves_every_so_many_steps_and_at_the_end(make_config, quiet):
    config = make_config(iters=5, save_every=2)
    engine, result = run(config, quiet)
    folder = Path(config.adapter_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
        "adapter_config.json",
        WEIGHTS,
        "checkpoints",
    ]
    assert same(on_disk(config, engine.model), parameters(engine.model))
    assert not same(
        on_disk(config, engine.model, "0000004_adapters.safetensors"), parameters(engine.model)
    )
    assert json.loads((folder / "adapter_config.json").read_text()) == config.to_dict()
    assert isinstance(result, TrainResult)
    assert (result.iterations, result.adapter_path, result.val_loss) == (5, folder, None)
    assert result.peak_memory_bytes > 0


def test_log_records(make_config, quiet, tmp_path):
    config, path = make_config(iters=4, steps_per_report=2), tmp_path / "run.jsonl"
    reset_peak()
    with RunLog(path) as log:
        _, result = run(config, quiet, valid=make_rows(4, 16), log=log)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(record) for record in records] == [
        [*record_keys(kind), "recent_peak_bytes"]
        for kind in ("val_loss", "train_loss", "val_loss", "train_loss")
    ]
    assert [record["iteration"] for record in records] == [0, 2, 3, 4]
    assert [record["disk_read_bytes"] for record in records] == [0, 2000, 3000, 4000]
    assert records[-1]["disk_write_bytes"] == 2000
    assert records[-1]["trained_tokens"] == 4 * 2 * 15
    assert records[-1]["train_loss"] == result.train_loss
    assert records[2]["val_loss"] == result.val_loss
    times = [record["time"] for record in records]
    assert times == sorted(times)
    recent = [record["recent_peak_bytes"] for record in records]
    assert max(recent) == records[-1]["peak_memory_bytes"] and min(recent) > 0


class Spoiled(PlainEngine):
    """Breaks the loss or a gradient at one step."""

    def __init__(self, model, step, loss=None, gradient=None):
        super().__init__(model)
        self._step, self._loss, self._gradient = step, loss, gradient

    def value_and_grad(self, batch):
        self._step -= 1
        (loss, tokens), gradients = super().value_and_grad(batch)
        if self._step == 0 and self._loss is not None:
            loss = mx.array(self._loss)
        if self._step == 0 and self._gradient is not None:
            block = gradients["model"]["layers"][1]["self_attn"]["q_proj"]
            block["lora_b"] = mx.full(block["lora_b"].shape, self._gradient)
        return (loss, tokens), gradients


def test_a_bad_row_is_named_by_file_and_line(make_config, quiet):
    rows = [Row("train.jsonl: line", 7 + i, *row) for i, row in enumerate(make_rows(2, 16))]
    engine = Spoiled(make_model(), step=1, loss=float("nan"))
    config = make_config(batch_size=1, seed=0)
    first = next(iterate_batches([row[2:4] for row in rows], 1, 16, seed=0)).indices[0]
    with pytest.raises(EdgeLoraError, match=rf"check train\.jsonl: line {7 + first};"):
        run(config, quiet, Dataset(rows, 16, "train.jsonl"), engine=engine)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(make_config, quiet, loss):
    config = make_config(iters=9, save_every=2)
    engine, intact = Spoiled(make_model(), step=4, loss=loss), {}
    recorder = Recorder()
    recorder.on_train_loss_report = lambda _info: intact.update(parameters(engine.model))
    with pytest.raises(
        EdgeLoraError,
        match=rf"step 4: loss is {loss}, .*check row \d, row \d; .* of step 2, is in .*adapters",
    ):
        run(config, quiet, engine=engine, callbacks=[recorder])
    assert same(parameters(engine.model), intact)
    assert same(
        on_disk(config, engine.model),
        on_disk(config, engine.model, "0000002_adapters.safetensors"),
    )


def test_a_gradient_that_is_not_finite_is_named(make_config, quiet):
    engine = Spoiled(make_model(), step=1, gradient=float("inf"))
    start = dict(parameters(engine.model))
    with pytest.raises(
        EdgeLoraError,
        match=r"step 1: the gradient of model\.layers\.1\.self_attn\.q_proj\.lora_b holds NaN.*"
        "no adapter was saved yet in this run",
    ):
        run(make_config(), quiet, engine=engine)
    assert same(parameters(engine.model), start)


def test_what_follows_a_bad_gradient_is_added_and_nothing_updated(make_config, quiet, monkeypatch):
    """Squares are read at the end of a step, also where more steps make one update."""
    engine = Spoiled(make_model(), step=2, gradient=float("nan"))
    added, trained = [], engine.adapters
    add = trained.add

    def noted(gradients, look):
        added.append(sorted(gradients))
        add(gradients, look)

    monkeypatch.setattr(trained, "add", noted)
    monkeypatch.setattr(trained, "update", lambda *_: pytest.fail("there was an update"))
    with pytest.raises(EdgeLoraError, match=r"step 2: the gradient of .*q_proj\.lora_b holds NaN"):
        run(make_config(grad_accumulation_steps=4), quiet, engine=engine)
    assert added == [sorted(parameters(engine.model))] * 2


def test_a_validation_loss_that_is_not_finite_ends_the_run(make_config, quiet):
    engine = PlainEngine(make_model())
    engine.loss = lambda _batch: (mx.array(float("nan")), 3)
    with pytest.raises(EdgeLoraError, match="step 1: validation loss is nan"):
        run(make_config(), quiet, engine=engine, valid=make_rows(4, 16))


class Stop(Exception):
    pass


class Stopper(Recorder):
    def __init__(self, iteration, exception=Stop):
        super().__init__()
        self._iteration, self._exception = iteration, exception

    def on_train_loss_report(self, info):
        if info["iteration"] == self._iteration:
            raise self._exception

    on_val_loss_report = on_train_loss_report


@pytest.mark.parametrize("exception", [Stop, KeyboardInterrupt])
def test_a_callbacks_exception_comes_through_and_the_steps_are_kept(make_config, quiet, exception):
    config, engine = make_config(iters=9, save_every=2), PlainEngine(make_model())
    with pytest.raises(exception):
        run(config, quiet, engine=engine, callbacks=[Stopper(3, exception)])
    assert same(on_disk(config, engine.model), parameters(engine.model))
    assert not same(
        on_disk(config, engine.model),
        on_disk(config, engine.model, "0000002_adapters.safetensors"),
    )


def test_a_callback_that_fails_before_the_first_step_leaves_the_folder_alone(make_config, quiet):
    config = make_config()
    with pytest.raises(Stop):
        run(config, quiet, valid=make_rows(4, 16), callbacks=[Stopper(0)])
    assert list(Path(config.adapter_path).iterdir()) == []


def test_every_callback_is_told(make_config, quiet):
    first, second = Recorder(), Recorder()
    run(make_config(iters=2), quiet, valid=make_rows(4, 16), callbacks=[first, second])
    assert first.train == second.train
    assert [info["iteration"] for info in first.train] == [1, 2]
    assert [info["iteration"] for info in first.val] == [0, 1]


def test_an_interrupt_keeps_the_last_save_and_says_so(make_config, quiet):
    config, engine = make_config(iters=9, save_every=2), PlainEngine(make_model())
    plain, steps = engine.value_and_grad, []

    def interrupted(batch):
        steps.append(batch)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return plain(batch)

    engine.value_and_grad = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(config, quiet, engine=engine)
    saved = on_disk(config, engine.model)
    assert same(saved, on_disk(config, engine.model, "0000002_adapters.safetensors"))
    assert "interrupted; the last good adapter, of step 2, is in" in quiet._lines.getvalue()


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(
    make_config, quiet, tmp_path
):
    (tmp_path / "file").write_text("")
    engine = PlainEngine(make_model())
    engine.value_and_grad = None
    with pytest.raises(EdgeLoraError, match="cannot be written"):
        run(make_config(adapter_path=str(tmp_path / "file" / "a")), quiet, engine=engine)


@pytest.mark.parametrize(("threshold", "cleared"), [(0, True), (1 << 40, False)])
def test_the_cache_is_cleared_over_its_threshold(make_config, quiet, threshold, cleared):
    caches = []

    class Watch(Recorder):
        def on_train_loss_report(self, info):
            caches.append(mx.get_cache_memory())

    mx.clear_cache()
    run(make_config(iters=3, clear_cache_threshold=threshold), quiet, callbacks=[Watch()])
    # Reading the learning rate leaves a few bytes in the cache after it was cleared.
    assert (max(caches) < 1 << 14) is cleared


def test_the_scheduled_learning_rate_is_reported(make_config, quiet):
    schedule = {"name": "linear_schedule", "arguments": [1e-3, 0.0, 4]}
    recorder = Recorder()
    run(make_config(iters=4, lr_schedule=schedule), quiet, callbacks=[recorder])
    rates = [info["learning_rate"] for info in recorder.train]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_data_order_follows_the_seed(make_config, quiet):
    losses = []
    for seed in (0, 0, 1):
        recorder = Recorder()
        run(make_config(seed=seed), quiet, callbacks=[recorder])
        losses.append([info["train_loss"] for info in recorder.train])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("most", [None, 1e-3])
def test_the_norm_is_that_of_mlx_before_clipping(make_config, quiet, accumulation, most):
    config = make_config(
        iters=3,
        grad_accumulation_steps=accumulation,
        max_grad_norm=most,
        learning_rate=1e-30,
        optimizer="sgd",
        steps_per_report=1,
    )
    rows, recorder = make_rows(8, 16), Recorder()
    engine, _ = run(config, quiet, rows, callbacks=[recorder])
    batches = iterate_batches(rows, 2, config.max_seq_length, loop=True, seed=config.seed)
    each = [engine.value_and_grad(batch)[1] for _, batch in zip(range(3), batches, strict=False)]
    if accumulation == 3:
        mean = tree_map(lambda *gradients: sum(gradients) / 3, *each)
        expected = [None, None, clip_grad_norm(mean, 1.0)[1].item()]
    else:
        expected = [clip_grad_norm(gradients, 1.0)[1].item() for gradients in each]
    assert [info.get("grad_norm") for info in recorder.train] == [
        norm and pytest.approx(norm, rel=1e-5) for norm in expected
    ]
