"""The parts of the benchmark that need no other process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.datasets import CacheDataset

from mlx_edgelora.benchmark import machine, options
from mlx_edgelora.benchmark.contenders import _dataset, batches_of, config_of, contenders
from mlx_edgelora.benchmark.ladder import LADDER, PublishedTable
from mlx_edgelora.benchmark.meters import WholePeak, disk_bytes, peak_footprint, whole_peak
from mlx_edgelora.benchmark.published import ROWS, published
from mlx_edgelora.benchmark.results import (
    TOLERANCES,
    Result,
    Step,
    adapter_gap,
    find_faults,
    movement,
    tolerance_of,
)
from mlx_edgelora.benchmark.rows import (
    batches,
    given_rows,
    sort_rows,
    synthetic_rows,
    tokenizer_of,
    words_for,
    write_rows,
)
from mlx_edgelora.benchmark.shapes import SHAPES, checkpoint
from mlx_edgelora.benchmark.worker import ComparisonDone, StepTimer
from mlx_edgelora.data import load_datasets
from mlx_edgelora.data.batches import iterate_batches
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.planner.machine import Machine, Rates
from mlx_edgelora.storage.safetensors import read_header


def result_of(*losses, gap=0.0, held=(0, 0, 0), unfinished=False):
    steps = [Step(1.0, loss, 0, 0, unfinished) for loss in losses]
    return Result("one", steps=steps, adapter_gap=gap, held=held)


def judged(result):
    find_faults(result, result_of(4.0, 3.0), TOLERANCES["float32"])
    return result.faults


def test_a_result_without_fault():
    assert judged(result_of(4.0, 3.0001)) == []


def test_small_losses_are_compared_as_differences_of_large_numbers():
    for own, faults in ((1.5e-4, 0), (3e-4, 1)):
        result = result_of(own)
        find_faults(result, result_of(1e-5), TOLERANCES["float32"])
        assert len(result.faults) == faults


@pytest.mark.parametrize(("asked", "exact"), [(None, True), ("0", True), ("1", False)])
def test_what_is_multiplied_in_fewer_bits_is_judged_as_such(asked, exact, monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if asked:
        monkeypatch.setenv("MLX_ENABLE_TF32", asked)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert tolerance_of("float32") == TOLERANCES["float32" if exact else "float16"]
    assert tolerance_of("bfloat16") == TOLERANCES["bfloat16"]
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert tolerance_of("float32") == TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("module", "asked"),
    [
        ("benchmark.worker", None),
        pytest.param("benchmark.worker", "1", marks=pytest.mark.slow),
        pytest.param("benchmark.__main__", None, marks=pytest.mark.slow),
        ("benchmark.__main__", "1"),
    ],
)
def test_the_benchmark_multiplies_float32_in_all_of_its_bits(module, asked):
    """Said before MLX is imported; whoever says otherwise is heard."""
    text = f"""if True:
        import os, sys
        class Spy:
            def find_spec(self, name, *rest):
                if name == "mlx.core":
                    print(os.environ.get("MLX_ENABLE_TF32"))
        sys.meta_path.insert(0, Spy())
        import mlx_edgelora.{module}"""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    environment |= {} if asked is None else {"MLX_ENABLE_TF32": asked}
    ran = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [asked or "0"]


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (result_of(4.0, 3.01), "its loss drifts from mlx-lm's: 3.010000 for 3.000000 at step 2"),
        (result_of(4.0, float("nan")), "its loss drifts"),
        (result_of(4.0, 3.0, gap=0.9), "its adapters are not mlx-lm's: their distance is 0.900"),
        (result_of(4.0, 3.0, gap=float("nan")), "its adapters are not"),
        (result_of(4.0, 3.0, gap=None), "it left no adapters"),
        (result_of(4.0, 3.0, held=(0, 5000, 0)), "its process was not fresh"),
        (result_of(4.0, 3.0, unfinished=True), "it left work unevaluated"),
    ],
)
def test_one_fault_is_enough(result, fault):
    (found,) = judged(result)
    assert found.startswith(fault)


def test_a_loss_that_stands_still_shows():
    order = [(0, 1), (2, 3), (0, 1), (2, 3)]
    assert movement([4.0, 5.0, 4.0, 5.0], order) == 0
    assert movement([4.0, 5.0, 3.0, 5.0], order) == 0.25
    assert movement([4.0, 5.0], order) is None


def test_the_distance_of_adapters(tmp_path):
    def save(name, value):
        mx.save_safetensors(str(tmp_path / name), {"a": mx.array([value, 0.0])})
        return tmp_path / f"{name}.safetensors"

    start, theirs, near = save("start", 1.0), save("theirs", 3.0), save("near", 2.5)
    assert adapter_gap(theirs, theirs, start) == 0
    assert adapter_gap(near, theirs, start) == 0.25
    assert adapter_gap(start, theirs, start) == 1
    assert adapter_gap(tmp_path / "none", theirs, start) is None
    assert adapter_gap(near, start, start) == float("inf")
    mx.save_safetensors(str(tmp_path / "other"), {"b": mx.zeros(2)})
    assert adapter_gap(tmp_path / "other.safetensors", theirs, start) is None


@pytest.mark.parametrize("embedded", [False, True])
def test_both_packages_see_the_same_batches(job, tmp_path, embedded):
    if embedded:
        job = job.with_(model=str(MODEL_PATH), data=str(tmp_path), context=40)
        assert write_rows(tmp_path, given_rows(DATA_PATH, 6))
    job = job.with_(output=str(tmp_path / "out"))
    _same_batches(job, tokenizer_of(MODEL_PATH if embedded else Path(job.model)))


def _same_batches(job, tokenizer):
    data = CacheDataset(_dataset(job, tokenizer))
    arguments = {"dataset": data, "batch_size": job.batch, "max_seq_length": job.limit}
    theirs = batches_of(job)(**arguments, loop=True)
    own_data = load_datasets(config_of(job), tokenizer)[0]
    ours = iterate_batches(own_data, job.batch, job.limit, loop=True, seed=0)
    for _, (tokens, lengths), batch in zip(range(5), theirs, ours, strict=False):
        np.testing.assert_array_equal(np.array(tokens), batch.tokens)
        steps, bounds = np.arange(1, tokens.shape[1]), np.array(lengths)
        mask = (steps >= bounds[:, :1]) & (steps <= bounds[:, 1:])
        np.testing.assert_array_equal(mask, batch.mask)


def test_rows_of_all_lengths_make_the_same_batches(job, tmp_path):
    lengths = 9, 40, 20, 70, 5, 33
    rows = [{"prompt": "w1 w2", "completion": "w3 " * length} for length in lengths]
    own = job.with_(
        data=str(tmp_path), output=str(tmp_path), mask_prompt=write_rows(tmp_path, rows)
    )
    tokenizer = tokenizer_of(Path(job.model))
    sort_rows(config_of(own), tokenizer)
    _same_batches(own, tokenizer)


@pytest.mark.parametrize("labelled", [0.3, 0.75, 1])
def test_synthetic_rows_have_their_share_of_labels(job, tmp_path, labelled):
    model = Path(job.model)
    tokenizer, words = tokenizer_of(model), words_for(model)
    masked = write_rows(tmp_path, synthetic_rows(tokenizer, 4, 100, labelled, words))
    own = job.with_(data=str(tmp_path), output=str(tmp_path), context=100, mask_prompt=masked)
    for rows, tokens, count in batches(config_of(own), tokenizer, 4):
        assert (len(rows), tokens, count) == (2, 200, 200 * labelled)


def test_a_random_model_is_written_once(tmp_path):
    for weights, dtype in (("float32", "F32"), ("bfloat16", "BF16"), ("4bit", "U32")):
        folder = checkpoint(tmp_path, "small", 1, weights)
        header = read_header(folder / "model.safetensors")
        assert header["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert folder.name == "small-1"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoint(tmp_path, "small", 1, "4bit") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"small-1", "small-1-float32", "small-1-bfloat16"}


def test_a_peak_survives_resets():
    mx.reset_peak_memory()
    with whole_peak() as peak:
        mx.eval(mx.zeros((2**20,)))
        mx.reset_peak_memory()
        assert mx.get_peak_memory() < 2**22 <= peak.bytes
    assert peak_footprint() > 2**22
    assert disk_bytes() is None or min(disk_bytes()) >= 0


@pytest.mark.parametrize(
    ("packed", "kernel", "sliced", "reported"),
    [
        (False, "auto", True, False),
        (True, "fused", False, False),
        (True, "fused", True, True),
        (True, "auto", False, True),
    ],
)
def test_other_kernels_are_told(packed, kernel, sliced, reported, monkeypatch):
    monkeypatch.setattr(machine, "on_cpu", lambda: True)
    assert (machine.kernels_differ(packed, kernel, sliced) is not None) == reported
    monkeypatch.setattr(machine, "on_cpu", lambda: False)
    assert machine.kernels_differ(packed, kernel, sliced) is None


def test_a_slow_blas_is_told(monkeypatch):
    monkeypatch.setattr(machine, "on_cpu", lambda: True)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "product_rate", lambda: 2.1e9)
    assert "float32 products run at 2.1 GFLOP/s" in machine.slow_blas()
    assert machine.slow_blas().endswith("export LD_PRELOAD=libopenblas.so.0")
    monkeypatch.setattr(machine, "product_rate", lambda: 40e9)
    assert machine.slow_blas() is None
    monkeypatch.undo()
    assert machine.product_rate() > 1e8


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shape", "nothing"], "command line: argument --shape: invalid choice: 'nothing'"),
        (["--shape", "small", "--model", "x"], "--shape: got it beside --model"),
        (["--blocks", "2"], "--blocks: got it without --shape"),
        (["--shape", "small", "--blocks", "5"], "--blocks: got 5, expected at most 4"),
        (["--steps", "4"], "--steps: got 4, expected at least 5"),
        (["--contexts", "0"], "command line: argument --contexts: got 0, expected a whole number"),
        (
            ["--labelled", "2"],
            "command line: argument --labelled: got 2, expected",
        ),
        (["--labelled", "0.5", "--data", "x"], "--labelled: got it where rows are given"),
        (["--budgets", "much"], "command line: argument --budgets: got much, expected none, min"),
        (["--budgets", "0%"], "command line: argument --budgets: got 0%, expected none, min"),
        (
            ["--ladder", "--shape", "small", "--budgets", "min"],
            "--budgets: got it with --ladder",
        ),
        (["--ladder"], "--ladder: got it without --shape"),
        (["--ladder", "--shape", "small", "--batch", "2"], "--batch: got it with --ladder"),
        (["--also", "cheats"], "--also: got 'cheats', expected module:function"),
        (["--bloks", "2"], "command line: unrecognized arguments: --bloks 2"),
    ],
)
def test_wrong_options_are_one_sentence(flags, sentence):
    with pytest.raises(EdgeLoraError) as caught:
        options.options_from_cli(flags)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_defaults():
    own = options.options_from_cli([])
    assert (own.shape, own.contexts, own.batch, own.labelled) == ("smollm2-135m", [512], 1, 0.3)
    assert own.is_demo and own.may_shorten and len(own.budgets) == 3
    assert not options.options_from_cli(["--contexts", "512"]).may_shorten
    shape = options.options_from_cli(["--shape", "qwen2.5-3b"])
    assert (shape.contexts, shape.batch, shape.labelled, shape.blocks) == ([512], 1, 0.3, 36)
    ladder = options.options_from_cli(["--shape", "qwen2.5-3b", "--ladder"])
    assert ladder.contexts == [1024, 2048, 4096, 8192, 16384]


def test_who_is_compared():
    rivals = contenders(("none", "100%", "12.5%", "1.5GB", "min"), ["cheats:honest"])
    assert [rival.name for rival in rivals] == [
        "mlx-lm",
        "mlx-lm, checkpointing",
        "mlx-lm, checkpointing, narrow",
        "cheats:honest",
        "mlx-edgelora, no limit",
        "mlx-edgelora, 100 %",
        "mlx-edgelora, 12.5 %",
        "mlx-edgelora, 1.50 GB",
        "mlx-edgelora, min",
    ]
    budgets = [rival.budget_for(1000) for rival in rivals if rival.is_ours]
    assert budgets == [2**50, 1000, 125, 1_500_000_000, "min"]
    few = contenders(("min",), variants=False)
    assert [rival.name for rival in few] == ["mlx-lm", "mlx-lm, checkpointing", "mlx-edgelora, min"]


def test_too_few_rows(tmp_path):
    write_rows(tmp_path, [{"text": "one"}])
    with pytest.raises(EdgeLoraError, match="has 1 rows, expected at least 2, 2 batches"):
        given_rows(tmp_path, 2)
    with pytest.raises(EdgeLoraError, match=r"has no train\.jsonl"):
        given_rows(tmp_path / "nowhere", 2)


def test_the_ladder_without_time_is_computed(tmp_path):
    rates = Rates(1e10, 1e9, 1e9, 1e9, 1e9, 1e9, 1e-6)
    climb = PublishedTable(
        "llama-3.2-3b", 28, Machine("here", rates), tmp_path, 0.0, lambda line: None
    )
    rungs = [climb.table_row(technique, 16384, None) for technique in LADDER]
    assert [table_row.how.partition(":")[0] for table_row in rungs] == ["computed"] * len(LADDER)
    assert [table_row.published for table_row in rungs[:5]] == [
        "out of memory",
        "out of memory",
        "24.05",
        "23.79",
        "6.95",
    ]
    peaks = [table_row.peak for table_row in rungs]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[6] >= peaks[7] > 0
    assert rungs[4].row()[-1] == "6.95"


def test_published_figures_have_their_place():
    assert published("llama-3.2-3b", ROWS[0])[8192] == 68.83
    assert published("llama-3.2-3b", ROWS[1])[16384] is None
    assert published("qwen2.5-3b", ROWS[-1])[1024] == 0.66
    assert published("small", ROWS[0]) == published("qwen2.5-3b", "+ tiling") == {}


def test_the_tokenizer_of_random_models(job):
    tokenizer = tokenizer_of(Path(job.model))
    assert tokenizer.encode("w3 w0 w12") == [3, 0, 12]
    assert tokenizer.eos_token_id == SHAPES["small"][-1] - 1
    assert json.loads(job.json())["context"] == 64


@pytest.mark.parametrize(("loss", "unfinished"), [(2.0, False), (mx.array(2.0), True)])
def test_a_loss_that_is_no_number_is_unfinished(job, loss, unfinished):
    reported = []
    turn = StepTimer(
        job, WholePeak(), lambda event, **values: reported.append(values), lambda: "go"
    )
    turn(loss)
    assert (reported[0]["loss"], reported[0]["unfinished"]) == (2.0, unfinished)
    stopping = StepTimer(job, WholePeak(), lambda event, **values: None, lambda: "")
    with pytest.raises(ComparisonDone):
        stopping(2.0)
