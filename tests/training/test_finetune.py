"""Whole runs through the Python API, against mlx-lm: same losses, adapters that go both ways."""

import contextlib
import dataclasses
import importlib
import json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import side_by_side
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load, load_model, load_tokenizer, quantize_model
from side_by_side import logits, mlx_lm_test_loss, run_mlx_lm, weights
from tiny import LENGTH, make_data, make_model, words, write_rows
from training_helpers import Recorder, record_keys

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora.data import iterate_batches, load_datasets
from mlx_edgelora.model import checkpoint
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.training.loop import train
from mlx_edgelora.training.opening import open_engine

module = importlib.import_module("mlx_edgelora.training.finetune")
ROWS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A quantized model and rows that all reach max_seq_length; nothing to validate on."""
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model")
    make_data(root / "data", rows=ROWS, splits=("train", "test"))
    return root


@pytest.fixture
def options(tiny, tmp_path):
    """options(**changes) -> a run's options; streamed, spilled, on all blocks."""
    return partial(make_options, tiny, tmp_path)


def make_options(tiny, folder, **changes):
    short = {"iters": 2, "lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.0}}
    short["val_batches"] = TrainConfig.val_batches
    return side_by_side.options(folder, tiny / "model", tiny / "data", **short | changes)


def run(config):
    """Train in silence; returns the result, the losses and what was told."""
    recorder, lines = Recorder(), []
    result = finetune(config, [recorder], lines.append)
    return result, [report["train_loss"] for report in recorder.train], lines


def with_keys(config, keys):
    lora = dataclasses.replace(config.lora_parameters, keys=keys)
    return dataclasses.replace(config, lora_parameters=lora)


@pytest.fixture
def trained_model(monkeypatch):
    """What the model of the engine answers right after training."""
    seen = {}

    def spy(engine, *rest, **more):
        result = train(engine, *rest, **more)
        seen["logits"] = logits(engine.model)
        mx.eval(seen)
        return result

    monkeypatch.setattr(module, "train", spy)
    return seen


def test_twenty_steps_are_those_of_mlx_lm(options, tmp_path):
    _, losses, _ = run(options(iters=20))
    expected = run_mlx_lm(options(iters=20), tmp_path / "theirs")
    assert len(losses) == len(expected) == 20
    assert np.abs(np.subtract(losses, expected)).max() < 1e-4
    assert expected[-1] < expected[0] - 0.5  # it is a training, not a standstill
    got, wanted = weights(tmp_path / "adapters"), weights(tmp_path / "theirs")
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = mx.linalg.norm((got[name] - value).reshape(-1))
        assert error.item() < 1e-3 * mx.linalg.norm(value.reshape(-1)).item(), name


def test_accumulated_gradients_are_those_of_mlx_lm(options, tmp_path):
    changes = {"iters": 6, "grad_accumulation_steps": 2, "num_layers": 2}
    changes |= {"optimizer": "sgd", "learning_rate": 0.1}  # unlike Adam, it sees a wrong factor
    _, losses, _ = run(options(**changes))
    expected = run_mlx_lm(options(**changes), tmp_path / "theirs")
    assert losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("weights", ["streamed", "resident"])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "model.embed_tokens"]])
def test_mlx_lm_gives_the_same_logits_with_an_adapter_written_here(
    options, tmp_path, tiny, trained_model, weights, keys
):
    config = options(weights=weights)
    run(with_keys(config, keys))
    model, _ = load(str(tiny / "model"), adapter_path=str(tmp_path / "adapters"))
    base, _ = load(str(tiny / "model"))
    ours = trained_model["logits"]
    assert mx.abs(ours - logits(model)).max().item() < 1e-4
    assert mx.abs(ours - logits(base)).max().item() > 1e-2


def test_layers_fuse_as_in_mlx_lm(options, tmp_path, tiny):
    run(options())
    resumed = options(
        weights="resident", resume_adapter_file=str(tmp_path / "adapters/adapters.safetensors")
    )
    theirs, _ = load(str(tiny / "model"), adapter_path=str(tmp_path / "adapters"))
    with open_engine(resumed, lambda line: None) as (engine, _, _):
        unfused = logits(engine.model)
        fuse(engine.model)
        fuse(theirs)
        assert not any("lora" in name for name, _ in tree_flatten(engine.model.parameters()))
        assert mx.abs(logits(engine.model) - unfused).max().item() < 1e-3
        assert mx.abs(logits(engine.model) - logits(theirs)).max().item() < 1e-3


def fuse(model):
    """What `mlx_lm.fuse --dequantize` does to the layers."""
    fused = [(n, m.fuse(dequantize=True)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))


def test_an_adapter_trained_by_mlx_lm_resumes_here(options, tmp_path):
    start, more = run_mlx_lm(options(iters=4), tmp_path / "adapters"), {"iters": 1}
    more["resume_adapter_file"] = str(tmp_path / "adapters" / "adapters.safetensors")
    expected = run_mlx_lm(options(**more), tmp_path / "theirs")
    result, losses, _ = run(options(**more, adapter_path=str(tmp_path / "ours")))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[0] < start[0] - 1e-2
    assert result.adapter_path == tmp_path / "ours"


def test_an_adapter_trained_here_resumes_in_mlx_lm(options, tmp_path):
    _, start, _ = run(options(iters=4))
    more = {"iters": 1, "resume_adapter_file": str(tmp_path / "adapters/adapters.safetensors")}
    _, expected, _ = run(options(**more, adapter_path=str(tmp_path / "ours")))
    losses = run_mlx_lm(options(**more), tmp_path / "theirs")
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[0] < start[0] - 1e-2


def test_a_test_alone_is_that_of_mlx_lm(options, tmp_path):
    """On the adapter as its own configuration describes it, whatever the options say."""
    run(options())
    alone = options(test=True, num_layers=1, lora_parameters={"rank": 7})
    result, losses, lines = run(alone)
    assert (result, losses) == (None, [])
    assert lines[-1] == expected_test_line(alone, adapter_path=str(tmp_path / "adapters"))
    assert [path.name for path in tmp_path.glob("adapters/0*")] == []


def test_a_test_of_the_base_model_needs_no_adapter(options):
    base = options(test=True, adapter_path="", num_layers=16)  # three blocks is what it has
    _, _, lines = run(base)
    assert lines[-1] == expected_test_line(base)


def expected_test_line(config, **options):
    loss, tokens = mlx_lm_test_loss(config, **options), ROWS * (LENGTH - 1)
    return f"test loss {loss:.3f}, perplexity {np.exp(loss):.3f} on {tokens} tokens"


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "resident"},
        {"activations": "ram", "spill_dir": None},
        {"kernel": "fused"},
        {"dtype": "float32"},
        {"weights": "resident", "activations": "ram", "spill_dir": None, "kernel": "fused"},
        {"memory_budget": "min"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_where_things_live_does_not_change_the_losses(options, reference, changes):
    _, losses, _ = run(options(**changes))
    assert losses == pytest.approx(reference, abs=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same_and_saves_float32(options, reference, tmp_path):
    _, losses, _ = run(options(dtype="bfloat16"))
    assert losses != pytest.approx(reference, abs=1e-6)
    assert losses == pytest.approx(reference, abs=3e-2)
    assert {value.dtype for value in weights(tmp_path / "adapters").values()} == {mx.float32}


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """Losses of the default run, two steps."""
    root = tmp_path_factory.mktemp("reference")
    return run(make_options(tiny, root))[1]


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(options, tmp_path):
    config = {"lora_parameters": {"rank": 4, "scale": 8.0, "dropout": 0.2}}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(options(**config, seed=seed, adapter_path=str(tmp_path / name)))
    a, b, c = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_quantizing_is_done_once_per_model_and_configuration(options, tmp_path):
    source = make_model(tmp_path / "whole", quantized=False)
    before = (source / "model.safetensors").read_bytes()
    config = options(model=str(source), quantize=4)
    _, losses, _ = run(config)
    model, settings = quantize_model(*load_model(source), 64, 4)
    assert settings["quantization"]["bits"] == 4
    train_set, _, _ = load_datasets(config, load_tokenizer(source))
    batch = next(iterate_batches(train_set, 3, LENGTH, seed=config.seed))
    assert losses[0] == pytest.approx(mean_loss(model, batch), abs=1e-5)

    (copy,) = (tmp_path / "cache").iterdir()
    stamp = (copy / "model.safetensors").stat().st_mtime_ns
    assert run(config)[1] == losses
    assert (copy / "model.safetensors").stat().st_mtime_ns == stamp

    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"rope_theta": 50.0}))
    assert run(config)[1] != losses  # not the copy made for another configuration
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert (source / "model.safetensors").read_bytes() == before


def test_two_runs_may_quantize_one_model_at_once(options, tmp_path, monkeypatch):
    """The slower one finds the copy of the faster one in its place."""
    source = make_model(tmp_path / "whole", quantized=False)
    copies, write = [], checkpoint.write_model

    def overtaken(folder, *rest):
        write(folder, *rest)
        if not copies:
            copies.append(None)
            run(options(model=str(source), quantize=4, adapter_path=str(tmp_path / "faster")))

    monkeypatch.setattr(checkpoint, "write_model", overtaken)
    _, losses, _ = run(options(model=str(source), quantize=4))
    assert len(losses) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def mean_loss(model, batch):
    inputs, targets = mx.array(batch.inputs()), mx.array(batch.labels())
    return nn.losses.cross_entropy(model(inputs), targets).mean().item()


def test_a_file_for_mlx_lm_runs_here(tiny, tmp_path):
    """The keys of mlx-lm's own example, a schedule and masked completions."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": words([i, 2]), "completion": words([i, 4])} for i in range(6)]
    for split in ("train", "valid", "test"):
        write_rows(data / f"{split}.jsonl", rows)
    (tmp_path / "lora.yaml").write_text(f"""
model: "{tiny / "model"}"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    weight_decay: 1e-2
data: "{data}"
seed: 0
num_layers: 2
batch_size: 2
iters: 4
val_batches: -1
learning_rate: 1e-5
steps_per_report: 2
steps_per_eval: 2
resume_adapter_file: null
adapter_path: "{tmp_path / "adapters"}"
save_every: 2
test: true
test_batches: 2
max_seq_length: 32
grad_checkpoint: true
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 2
  warmup_init: 1e-7
  arguments: [1e-3, 100]
""")
    result, losses, lines = run(TrainConfig.from_yaml(tmp_path / "lora.yaml"))
    assert (result.iterations, len(losses)) == (4, 2)
    assert result.trained_tokens == 4 * 2 * 3  # two words and the end, of each row
    assert "on 12 tokens" in lines[-1]
    names = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert names == [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "checkpoints",
    ]
    assert {name.split(".", 3)[3] for name in weights(tmp_path / "adapters")} == {
        f"self_attn.{layer}.{matrix}"
        for layer in ("q_proj", "v_proj")
        for matrix in ("lora_a", "lora_b")
    }


def test_log_and_callbacks_are_told_of_every_report(options, tmp_path, tiny):
    data = make_data(tmp_path / "data", rows=9)
    recorder = Recorder()
    config = options(data=str(data), log=str(tmp_path / "run.jsonl"), steps_per_eval=2)
    finetune(config, [recorder], lambda line: None)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    records = [record for record in lines if "iteration" in record]
    events = [next(iter(record)) for record in lines if "iteration" not in record]
    assert events == ["run", "plan", "step_memory", "step_memory", "end"]
    assert lines[0]["run"]["options"] == config.to_dict()
    peaks = [record.pop("recent_peak_bytes") for record in records]
    assert max(peaks) == records[-1]["peak_memory_bytes"]
    kinds = ["train_loss" if "train_loss" in record else "val_loss" for record in records]
    assert kinds == ["val_loss", "train_loss", "val_loss", "train_loss"]
    assert [record["iteration"] for record in records] == [0, 1, 1, 2]
    for record, reported in zip(records[::2], recorder.val, strict=True):
        assert record.items() <= reported.items()
    for record, reported in zip(records[1::2], recorder.train, strict=True):
        assert record.items() <= reported.items()
    last = records[-1]
    shapes = [value.size for value in weights(tmp_path / "adapters").values()]
    assert last["trained_tokens"] == 2 * 3 * (LENGTH - 1)
    assert last["disk_write_bytes"] > 0 and last["disk_read_bytes"] > last["disk_write_bytes"]
    assert last["peak_memory_bytes"] > 4 * sum(shapes)
    assert list(last) == record_keys("train_loss")


def test_without_a_valid_set_it_says_so(options):
    _, _, lines = run(options())
    assert any("no valid set" in line for line in lines)
    _, _, lines = run(options(val_batches=0))
    assert not any("no valid set" in line for line in lines)


@pytest.mark.parametrize("fails", [False, True])
def test_mlx_and_numpy_are_left_as_they_were(options, monkeypatch, fails):
    before = mx.set_cache_limit(12345678)
    np.random.seed(5)
    state = np.random.get_state()[1].tolist()
    limits = []
    monkeypatch.setattr(Recorder, "on_train_loss_report", lambda *_: limits.append(limit()))
    try:
        with pytest.raises(EdgeLoraError) if fails else contextlib.nullcontext():
            run(options(num_layers=99 if fails else -1))
        assert limit() == 12345678
        assert limits == ([] if fails else [12345678] * 2)
        mx.set_cache_limit(10 * Plan().cache_bytes)
        run(options(memory_budget="min"))
        assert limits[-1] < Plan().cache_bytes
        assert limit() == 10 * Plan().cache_bytes
        assert np.random.get_state()[1].tolist() == state
    finally:
        mx.set_cache_limit(before)


def limit():
    now = mx.set_cache_limit(0)
    mx.set_cache_limit(now)
    return now


def test_an_interrupt_keeps_the_last_adapter(options, tmp_path, capsys):
    class Impatient(Recorder):
        def on_train_loss_report(self, info):
            if info["iteration"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(options(iters=5, save_every=2), [Impatient()], lambda line: None)
    assert "interrupted; the last good adapter, of step 3, is in" in capsys.readouterr().out
    numbered = tmp_path / "adapters" / "0000002_adapters.safetensors"
    last = tmp_path / "adapters" / "adapters.safetensors"
    assert last.read_bytes() != numbered.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1  # the spill file had no name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), "out of memory .*9 bytes"),
        (RuntimeError("Command buffer execution failed: Insufficient Memory"), "out of memory"),
        (MemoryError(), "out of memory .MemoryError.; lower batch_size or max_seq_length"),
    ],
)
def test_used_up_memory_is_one_sentence(options, monkeypatch, error, expected):
    monkeypatch.setattr(module, "train", raising(error))
    with pytest.raises(EdgeLoraError, match=expected):
        run(options())


def test_any_other_error_of_mlx_comes_through(options, monkeypatch):
    monkeypatch.setattr(module, "train", raising(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(options())


def raising(error):
    def call(*args, **more):
        raise error

    return call


@pytest.mark.parametrize(
    ("architecture", "dtype", "reported"),
    [
        ("applegpu_g14g", "bfloat16", True),
        ("applegpu_g14g", "float16", False),
        ("applegpu_g14g", None, False),
        ("applegpu_g16s", "bfloat16", False),
    ],
)
def test_bfloat16_on_a_gpu_that_has_none_is_told(
    options, monkeypatch, architecture, dtype, reported
):
    device = mx.device_info() | {"architecture": architecture}
    monkeypatch.setattr(mx, "device_info", lambda: device)
    _, _, lines = run(options(iters=1) if dtype is None else options(iters=1, dtype=dtype))
    assert sum("float16 is faster" in line for line in lines) == reported


@pytest.mark.parametrize("quantized", [True, False])
def test_a_checkpoint_in_float16_is_computed_in_it(options, tmp_path, quantized):
    folder = make_model(tmp_path / "model", quantized=quantized)
    tensors = mx.load(str(folder / "model.safetensors"))
    half = {n: v.astype(mx.float16) if v.dtype == mx.float32 else v for n, v in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half)
    with open_engine(options(model=str(folder)), lambda line: None) as (engine, _, _):
        assert engine.walk.blocks.hidden_dtype == mx.float16


def test_a_resume_file_for_a_test_alone_is_refused(options):
    with pytest.raises(
        EdgeLoraError, match=r"resume_adapter_file: got 'a.safetensors' without training"
    ):
        run(options(test=True, resume_adapter_file="a.safetensors"))


def test_an_optimizer_argument_that_only_fails_in_a_step_is_refused(options):
    with pytest.raises(EdgeLoraError, match=r"adafactor.eps: got 3, expected 2 numbers"):
        options(optimizer="adafactor", optimizer_config={"adafactor": {"eps": 3}})


def test_a_test_loss_beyond_the_exponential_is_no_overflow(options, monkeypatch):
    monkeypatch.setattr(module, "evaluate", lambda *_, **_options: (1000.0, 7))
    _, _, lines = run(options(test=True, adapter_path=""))
    assert lines[-1] == "test loss 1000.000, perplexity inf on 7 tokens"


def test_a_test_loss_that_is_nan_is_an_error(options, monkeypatch):
    monkeypatch.setattr(module, "evaluate", lambda *_, **_options: (float("nan"), 7))
    with pytest.raises(EdgeLoraError, match="test loss is nan on 7 tokens"):
        run(options(test=True, adapter_path=""))


def test_the_memory_profile_is_written_and_told(options, tmp_path):
    lines = []
    folder = tmp_path / "profile"
    finetune(options(memory_profile=str(folder)), notify=lines.append)
    entries = json.loads((folder / "memory.json").read_text())
    assert {"load", "forward", "spill", "head", "update"} <= {s["phase"] for s in entries}
    assert any("<- the peak of the step" in line for line in lines)
