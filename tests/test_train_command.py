"""The command: whatever it is given, one sentence and a status, and no good file damaged."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import LENGTH, make_model, words, write_rows

from mlx_edgelora.train import main
from mlx_edgelora.training import loop

ROOT = Path(__file__).parent.parent
GOOD = b"stands here from an earlier run"


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    """arguments(iters=3, ...) -> argv; None takes a flag away, True gives it no value."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(**changes):
        flags = {
            "model": tiny / "model",
            "data": tiny / "data",
            "adapter_path": tmp_path / "adapters",
            "spill_dir": tmp_path,
            "cache_dir": tmp_path / "cache",
            "batch_size": 2,
            "iters": 2,
            "num_layers": -1,
            "max_seq_length": LENGTH,
            "weights": "streamed",
            "activations": "spill",
            "adapters": "resident",
        } | changes
        argv = []
        for name, value in flags.items():
            if value is not None:
                argv += ["--" + name.replace("_", "-")] + [str(value)] * (value is not True)
        return argv

    return make


@pytest.fixture
def refused(arguments, tmp_path, capsys):
    """refused(**changes) -> the one sentence that a run gives; checks that it only gives that."""

    def run(**changes):
        adapters = tmp_path / "adapters"
        old = {}
        if not adapters.exists():
            adapters.mkdir()
            (adapters / "adapters.safetensors").write_bytes(GOOD)
        old = {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()}
        assert main(arguments(**{"overwrite": True} | changes)) == 2
        assert {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()} == old
        return sentence(capsys.readouterr().err)

    return run


def sentence(stderr):
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n") and stderr.count("\n") == 1
    assert "Traceback" not in stderr
    return stderr.removeprefix("error: ").strip()


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the model to be spoilt."""
    return shutil.copytree(tiny / "model", tmp_path / "model")


@pytest.fixture
def data(tiny, tmp_path):
    """A copy of the data to be spoilt."""
    return shutil.copytree(tiny / "data", tmp_path / "data")


def edit_json(path, **changes):
    """Set keys of a JSON object; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_header(shard, name, **changes):
    """Let the header of a safetensors file say something else about a tensor."""
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


# The model


def test_a_missing_shard(refused, model):
    (model / "model.safetensors").unlink()
    assert "model.safetensors is missing, expected every shard" in refused(model=model)


@pytest.mark.parametrize("size", [0, 7, 5000, -1])
def test_a_truncated_shard(refused, model, size):
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    text = refused(model=model)
    assert text.startswith(f"{shard}: damaged safetensors file: ")
    assert text.endswith("download or write the file again")


NORM = "model.layers.1.input_layernorm.weight"
PACKED = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "lie", "expected"),
    [
        (NORM, {"shape": [65]}, "spans 256 bytes, its shape needs 260"),
        (NORM, {"data_offsets": [0, 256]}, "starts at byte"),
        (NORM, {"dtype": ["F32"]}, "has dtype ['F32'], expected one of BOOL"),
        (NORM, {"dtype": "I32"}, f"{NORM} has dtype mlx.core.int32, which a RMSNorm cannot have"),
        (PACKED, {"dtype": "F32"}, f"{PACKED} has dtype mlx.core.float32, which a QuantizedLinear"),
        (PACKED, {"shape": [8, 64]}, "packed weights of shape (8, 64) with scales"),
    ],
)
def test_a_header_that_lies(refused, model, name, lie, expected):
    edit_header(model / "model.safetensors", name, **lie)
    assert expected in refused(model=model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": None}, "config.json: no model_type, expected an architecture of mlx-lm"),
        ({"model_type": "nonesuch"}, "(ValueError: Model type nonesuch not supported)"),
        ({"model_type": "cache"}, "mlx-lm cannot build this model (AttributeError"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1"),
        ({"num_hidden_layers": 4}, "(ValueError: Missing 11 parameters: model.layers.3."),
        ({"hidden_size": 128}, "(ValueError: Expected shape (128, 8) but received shape (64, 8)"),
        ({"hidden_size": None}, "'hidden_size'); use a model that it can load"),
        ({"rope_theta": "high"}, "mlx-lm cannot build this model (TypeError: rope(): incompatible"),
        ({"quantization": "yes"}, "has a quantization of 'yes', expected a group_size"),
        ({"model_file": "own.py"}, "asks to run its own code ('own.py'), which is never done"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_makes_no_model(refused, model, changes, expected):
    edit_json(model / "config.json", **changes)
    assert expected in refused(model=model)


@pytest.mark.parametrize("content", ["", '{"model_type":', "[]", "[" * 100_000, b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_invalid_json_beside_the_model(refused, model, name, content):
    content = content if isinstance(content, bytes) else content.encode()
    (model / name).write_bytes(content)
    assert refused(model=model).startswith(f"{model / name}: ")


@pytest.mark.parametrize("weight_map", [None, [1], {"a": 1}])
def test_an_index_that_is_none(refused, model, weight_map):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json: weight_map does not name a file" in refused(model=model)


def test_a_model_without_a_tokenizer(refused, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert refused(model=model).startswith(f"{model}: has no tokenizer, expected a file such as")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"type": "Nope"}}, "did not match any variant"),  # a bare Exception
        ({"added_tokens": None}, "no key 'added_tokens'"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(refused, model, changes, expected):
    edit_json(model / "tokenizer.json", **changes)
    text = refused(model=model)
    assert text.startswith(f"{model}: the tokenizer cannot be loaded (")
    assert expected in text


def test_a_tokenizer_of_a_larger_model(refused, tmp_path):
    """Tokens beyond the embedding would be read from what lies behind it in the file."""
    make_model(tmp_path / "other", first_word=100)
    text = refused(model=tmp_path / "other")
    assert "train.jsonl: line 1: has token " in text
    assert "but the model's vocabulary ends at 127; its tokenizer belongs to another" in text


@pytest.mark.parametrize("weights", ["streamed", "resident"])
def test_a_model_with_nan_in_it(refused, model, weights):
    shard = model / "model.safetensors"
    arrays = mx.load(str(shard))
    arrays[NORM][3] = float("nan")
    mx.eval(arrays)
    mx.save_safetensors(str(shard), arrays)
    text = refused(model=model, weights=weights, val_batches=0)
    assert text.startswith("step 1: loss is nan, expected finite numbers")
    assert "no adapter was saved yet in this run" in text


def test_an_unknown_name_on_the_hub_fails_without_a_network(refused):
    text = refused(model="nobody/nothing-of-this-name")
    assert text.startswith("model: 'nobody/nothing-of-this-name' is not a folder here and cannot")


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/here", "a/b/c"])
def test_a_model_that_is_no_folder(refused, name):
    assert refused(model=name).startswith(f"model: {name!r} is not a folder, expected")


# The data


def test_a_line_that_is_not_json(refused, data):
    with (data / "train.jsonl").open("a") as file:
        file.write('{"text": "w1"\n')
    assert "train.jsonl: line 9: is not JSON (Expecting ',' delimiter" in refused(data=data)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "\xff"}', "line 9: is not UTF-8 text"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 9: is not JSON (Exceeds the limit"),
        (b'{"text": "\\uD800 w1"}', "line 9: holds half of a surrogate pair"),
        (b"[" * 100_000, "line 9: is nested too deeply"),
        (b'{"words": "w1"}', "line 9: got the keys 'words', expected 'text'"),
    ],
    ids=["utf-8", "digits", "surrogate", "deep", "key"],
)
def test_a_line_that_is_no_row(refused, data, line, expected):
    with (data / "train.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert expected in refused(data=data)


def test_a_pair_of_surrogates_is_a_character(arguments, data):
    write_rows(data / "train.jsonl", [{"text": "w1 \U0001f600"}] * 2)
    assert main(arguments(data=data, iters=1, allow_lost_content=True)) == 0


def test_no_token_to_train_after_masking(refused, data):
    row = {"prompt": words([1] * 30), "completion": "w2"}
    for split in ("train", "valid"):
        write_rows(data / f"{split}.jsonl", [row] * 4)
    text = refused(data=data, mask_prompt=True)
    assert "train.jsonl: none of its 4 rows has a token to train on within max_seq_length" in text


def unbroken(text):
    """Output whose long lines are one again."""
    return " ".join(text.split())


def test_longer_rows_are_cut_and_counted_in_one_warning(arguments, data, capsys):
    long = [{"text": words([3] * count)} for count in (30, 5, 40, 6)]
    write_rows(data / "train.jsonl", long)
    assert main(arguments(data=data, iters=5)) == 0
    printed = unbroken(capsys.readouterr().out)
    assert printed.count("warning") == 1
    assert (
        f"warning: {data / 'train.jsonl'}: of 4 rows, 2 longer than max_seq_length {LENGTH} "
        "(up to 41 tokens) and truncated" in printed
    )


# Options


def test_too_many_blocks(refused):
    assert refused(num_layers=4) == (
        "num_layers: got 4, but the model has 3 blocks; lower it, or use -1 for all"
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["self_attn.q_porj"], "did you mean 'self_attn.q_proj'"),
        (["input_layernorm"], "Can't convert layer of type RMSNorm to LoRA; name linear layers"),
        (["self_attn.q_proj", "model.layers.2.self_attn.q_proj"], "each of them once"),
    ],
)
def test_keys_that_name_no_linear_layer(refused, tmp_path, keys, expected):
    (tmp_path / "run.yaml").write_text(json.dumps({"lora_parameters": {"keys": keys}}))
    text = refused(config=tmp_path / "run.yaml")
    assert text.startswith("lora_parameters.keys: ")
    assert expected in text


def test_a_rank_that_no_memory_holds(refused, tmp_path):
    (tmp_path / "run.yaml").write_text('{"lora_parameters": {"rank": 1000000000}}')
    assert "lora_parameters.rank: got 1000000000, expected" in refused(config=tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["model", "data", "log", "report", "spill_dir", "cache_dir"])
def test_an_empty_name_is_not_passed_over(refused, name):
    text = refused(**{name: ""})
    sentence = f"--{name.replace('_', '-')}: got '', expected text that is not empty"
    assert text.startswith(sentence)


def test_a_name_with_a_null_character(refused, tmp_path):
    (tmp_path / "run.yaml").write_text(r'log: "a\0b"')
    assert r"log: got 'a\x00b', expected text" in refused(config=tmp_path / "run.yaml")


def test_an_option_that_contradicts_the_model(refused, tiny):
    text = refused(quantize=4)
    assert text.startswith(f"quantize: got 4 bits, but {tiny / 'model'} is already quantized")


# The loss


def test_the_approximate_loss_trains_and_tells_what_it_does(arguments, tmp_path, capsys):
    loss = {"loss": "approximate", "loss_k": 5, "loss_max_subset": 90}
    assert main(arguments(**loss, no_loss_tail_correction=True, test=True, train=True)) == 0
    found = capsys.readouterr()
    printed, (path,) = unbroken(found.out), (tmp_path / "cache").iterdir()
    (count,) = re.findall(
        rf"nearest tokens: (\d+) of \1 labels to compute, kept in {path}", printed
    )
    assert int(count) > 50
    assert "over the 5 nearest tokens of each label, without tail correction" in printed
    assert "test loss " in printed
    assert found.err == ""
    assert main(arguments(**loss, overwrite=True)) == 0
    printed = unbroken(capsys.readouterr().out)
    assert f"nearest tokens: all of {count} labels are in {path}" in printed
    assert ", with tail correction" in printed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": "approximate", "loss_k": 129}, "loss_k: got 129, expected 1 to 128, the model's"),
        ({"loss": "approximate", "loss_k": 0}, "--loss-k: got 0, expected a whole number of at"),
        ({"loss": "approximate", "loss_k": -5}, "--loss-k: got -5, expected a whole number of at"),
        (
            {"loss": "approximate", "loss_max_subset": 0},
            "--loss-max-subset: got 0, expected a whole",
        ),
        ({"loss_k": 10}, "loss_k: got 10 with the exact loss, which has no use for it"),
        ({"no_loss_tail_correction": True}, "loss_tail_correction: got False with the exact loss"),
        ({"loss": "approximate", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with the appr"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_options_of_the_loss_that_do_not_fit(refused, tmp_path, changes, expected):
    """Refused before a cache is made."""
    text = refused(**changes)
    assert text.startswith(expected)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "lora", "expected"),
    [
        ("qwen3", {"keys": ["model.embed_tokens"]}, "its head is adapted"),
        ("llama", {"keys": ["lm_head"]}, "its head is adapted"),
        (
            "llama",
            {"keys": ["lm_head"], "dropout": 0.5},
            "its logits are not products with one matrix",
        ),
    ],
)
def test_heads_that_the_approximate_loss_cannot_take(refused, tmp_path, name, lora, expected):
    make_model(tmp_path / "other", name)
    (tmp_path / "run.yaml").write_text(json.dumps({"lora_parameters": lora}))
    text = refused(
        model=tmp_path / "other",
        config=tmp_path / "run.yaml",
        loss="approximate",
    )
    assert text == (
        f"loss: got approximate, but {expected}, expected a frozen head; use the exact loss, or "
        "name other layers in lora_parameters.keys"
    )


def test_a_file_of_neighbours_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_bytes(GOOD)
    text = refused(loss="approximate", cache_dir=tmp_path / "file" / "below")
    assert text.startswith(f"{tmp_path / 'file' / 'below'}/neighbours-")
    assert "cannot be written (Not a directory); free some space or choose another folder" in text


def test_a_disk_full_while_neighbours_are_computed(refused, arguments, tmp_path):
    ram = {"loss": "approximate", "loss_k": 100, "activations": "ram", "spill_dir": None}
    assert main(arguments(**ram, iters=1)) == 0
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-20_000:] = bytes(20_000)
    path.write_bytes(content)
    with full_disk(len(content) - 10_000):
        text = refused(**ram)
    assert text.startswith(f"{path}: cannot be written (File too large); free some space")
    assert main(arguments(**ram, iters=1, overwrite=True)) == 0


@pytest.mark.skipif("wandb" in sys.modules, reason="wandb is installed")
def test_a_service_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr("mlx_lm.tuner.callbacks.wandb", None, raising=False)
    assert refused(report_to="wandb").startswith("report_to: wandb is not installed; run `pip")


# Folders and disks


@pytest.mark.parametrize("option", ["adapter_path", "spill_dir", "log"])
def test_a_folder_that_cannot_be_written(refused, tmp_path, option):
    (tmp_path / "file").write_bytes(GOOD)
    text = refused(**{option: tmp_path / "file" / "below"})
    assert text.startswith(f"{tmp_path / 'file' / 'below'}: ")
    assert "(Not a directory)" in text
    assert (tmp_path / "file").read_bytes() == GOOD


def test_a_cache_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_bytes(GOOD)
    make_model(tmp_path / "whole", quantized=False)
    text = refused(model=tmp_path / "whole", quantize=4, cache_dir=tmp_path / "file" / "below")
    assert text.startswith(str(tmp_path / "file" / "below"))
    assert "the converted model cannot be written (Not a directory" in text


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes, as on a disk that is full.

    A context and not a fixture: the limit also holds for the file that pytest may write to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_full_while_spilling(refused, tmp_path):
    with full_disk(4096):
        text = refused()
    assert text.startswith(f"{tmp_path}: spilling activations needs ")
    assert text.endswith("choose another folder with --spill-dir, or use --activations ram")


def test_a_disk_full_while_saving(arguments, tmp_path, capsys):
    ram = {"activations": "ram", "spill_dir": None}
    assert main(arguments(**ram)) == 0
    folder = tmp_path / "adapters"
    good = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    with full_disk(20_000):
        assert main(arguments(**ram, learning_rate=1e-2, overwrite=True)) == 2
    text = sentence(capsys.readouterr().err)
    assert text.startswith(str(folder)) and "cannot be written (File too large)" in text
    assert text.endswith("free some space or choose a folder on another volume")
    left = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert left == good


def test_a_disk_full_while_quantizing(refused, tmp_path):
    make_model(tmp_path / "whole", quantized=False)
    with full_disk(20_000):
        text = refused(model=tmp_path / "whole", quantize=4)
    assert "the converted model cannot be written (File too large" in text
    assert list((tmp_path / "cache").iterdir()) == []  # half a copy is never taken for a whole


# While training


def test_a_loss_that_becomes_nan(arguments, tmp_path, monkeypatch, capsys):
    """The last good adapter stays and is named."""
    folder, kept = tmp_path / "adapters", []
    monkeypatch.setattr(loop, "save_adapters", keep(loop.save_adapters, kept))
    assert main(arguments(iters=9, learning_rate=1e30, save_every=1, val_batches=0)) == 2
    text = sentence(capsys.readouterr().err)
    assert text.startswith("step 2: loss is nan, expected finite numbers; lower the learning rate")
    assert text.endswith(f"the last good adapter, of step 1, is in {folder}/adapters.safetensors")
    assert kept == [(folder / "adapters.safetensors").read_bytes()]


def keep(save, kept):
    def spy(folder, *rest):
        save(folder, *rest)
        kept.append((folder / "adapters.safetensors").read_bytes())

    return spy


# Adapters


def test_an_adapter_of_another_model(refused, arguments, tmp_path, tiny):
    assert main(arguments()) == 0
    make_model(tmp_path / "narrow", hidden_size=32)
    file = tmp_path / "adapters" / "adapters.safetensors"
    for how in ({"test": True}, {"resume_adapter_file": file}):
        text = refused(model=tmp_path / "narrow", **how)
        assert text.startswith(f"{file}: model.layers.0.self_attn.q_proj.lora_a has shape (64, 8)")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged safetensors file: 0 bytes long"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_resume_file_that_is_none(refused, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "a.safetensors").write_bytes(content)
    assert expected in refused(resume_adapter_file=tmp_path / "a.safetensors")


def test_a_resume_file_of_a_model(refused, tiny):
    text = refused(resume_adapter_file=tiny / "model" / "model.safetensors")
    assert "does not fit: lacks model.layers.0" in text


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "[" * 100_000])
def test_a_test_of_what_is_no_adapter(refused, tmp_path, content):
    folder = tmp_path / "no"
    folder.mkdir()
    if content is not None:
        (folder / "adapter_config.json").write_text(content)
    text = refused(test=True, adapter_path=folder)
    assert text.startswith(f"{folder / 'adapter_config.json'}: not the configuration of an adapter")


# As a user runs it


@pytest.fixture
def command(arguments, tmp_path):
    """command(**changes) -> the command as a process, begun in an empty folder."""
    (tmp_path / "here").mkdir()
    begun = []
    # What runs in a shell's background ignores interrupts, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(**changes):
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "mlx_edgelora.train", *arguments(**changes)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
                cwd=tmp_path / "here",
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return begun[-1]

    yield begin
    signal.signal(signal.SIGINT, before)
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_a_good_run_as_a_process(command, tmp_path):
    process = command(test=True, train=True, log=tmp_path / "run.jsonl")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert "2/2  adapter saved in" in stdout
    assert "test loss " in stdout
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert sum("iteration" in json.loads(line) for line in lines) == 3
    assert "test" in json.loads(lines[-2]) and "end" in json.loads(lines[-1])
    assert (tmp_path / "adapters" / "adapter_config.json").exists()


def test_a_bad_run_as_a_process(command, tmp_path):
    process = command(model="nobody/nothing-of-this-name")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert sentence(stderr).startswith("model: 'nobody/nothing-of-this-name' is not a")
    assert list((tmp_path / "here").iterdir()) == []


def test_an_interrupt_is_130_and_keeps_the_last_adapter(command, tmp_path, arguments):
    process = command(iters=100_000, save_every=3, val_batches=0)
    while "adapter saved" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGINT: the run ends after this step and is saved" in stderr
    assert re.search(r"SIGINT: ended after step \d+ of 100000", unbroken(stdout))
    assert main(arguments(test=True)) == 0


def test_a_reader_who_leaves_is_no_traceback(command):
    process = command(iters=100_000, steps_per_report=1)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
