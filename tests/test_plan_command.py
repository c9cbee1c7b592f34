"""`python -m mlx_edgelora.plan`: what it tells, its exit status, and models that are not here."""

import json
import re
import struct
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import LENGTH

from mlx_edgelora import plan
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage.safetensors import read_header


@pytest.fixture
def run_command(tiny, tmp_path, capsys):
    """run_command(*flags) -> exit status, standard output and error."""

    def call(*flags, model=tiny / "model"):
        common = ["--model", model, "--spill-dir", tmp_path, "--num-layers", "-1"]
        status = plan.main([str(flag) for flag in (*common, *flags)])
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def test_a_run_that_fits(run_command):
    status, out, err = run_command(
        "--max-seq-length", 65, "--batch-size", 2, "--memory-budget", "1GB"
    )
    assert (status, err) == (0, "")
    assert out.startswith(
        "2 x 64 tokens, 128 of them labelled, adapters of rank 8 on 3 of 3 blocks"
    )
    for line in ("fits in 1.00 GB (as given)", "smallest budget that works", "  peak of backward"):
        assert line in out
    assert "  activations           kept" in out


def test_a_run_that_does_not_fit(run_command):
    status, out, _ = run_command(
        "--max-seq-length", 4096, "--batch-size", 8, "--memory-budget", "1MB"
    )
    assert status == 1
    assert "does not fit in 1.00 MB (as given)" in out
    assert "smallest plan" in out


def test_json_has_the_same_answers(run_command):
    status, out, _ = run_command("--json", "--labelled", 0.5, "--memory-budget", "1GB")
    answers = json.loads(out)
    assert (status, answers["fits"], answers["budget_bytes"]) == (0, True, 10**9)
    assert answers["batch"] == {
        "rows": 4,
        "tokens": 2047,
        "labelled": 4094,
        "context": 0,
    }
    assert answers["smallest_budget_bytes"] <= answers["expected_peak_bytes"] * 2
    assert answers["longest_context_tokens"] >= 2047 and answers["largest_batch_rows"] >= 4
    peaks = answers["expected_peak_bytes_by_phase"].values()
    assert answers["expected_peak_bytes"] == max(peaks)
    Plan.from_json(json.dumps(answers["plan"]), "here")


def test_data_say_how_long_the_batches_are(run_command, tiny):
    _, out, _ = run_command("--data", tiny / "data", "--batch-size", 2, "--memory-budget", "1GB")
    assert out.startswith(f"2 x {LENGTH + 19} tokens, {2 * (LENGTH - 1)} of them labelled")


def test_without_a_budget_the_machine_says(run_command):
    status, out, _ = run_command()
    assert (status == 0 and "80 % of" in out) or "recommends" in out


def test_the_least_memory(run_command):
    _, out, _ = run_command("--memory-budget", "min", "--max-seq-length", 16385, "--labelled", 0.02)
    assert "for the least memory" in out
    rows = dict(re.findall(r"^  (\S.*?)  +(.+)$", out, re.MULTILINE))
    assert rows["token tiles"] == "256 tokens at a time"
    assert rows["inputs of blocks"] == rows["adapters"] == "in a file"
    assert rows["weights"] == rows["embedding and head"] == "from disk"


def test_a_plan_is_written_and_read(run_command, tmp_path):
    file = tmp_path / "plan.json"
    run_command("--memory-budget", "1GB", "--plan-out", file)
    changed = json.loads(file.read_text()) | {"kept_blocks": 1, "reason": "mine"}
    file.write_text(json.dumps(changed))
    _, out, _ = run_command("--plan", file, "--json")
    assert json.loads(out)["plan"] == changed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--labelled", 0], "error: --labelled: got 0.0, expected a number above 0"),
        (["--memory-budget", "lots"], "error: --memory-budget: got 'lots', expected min, or a si"),
        (["--memori-budget", "1GB"], "error: command line: --memori-budget: unknown key"),
        (["--plan", "nowhere.json"], "error: nowhere.json: cannot be read (No such file"),
    ],
)
def test_wrong_input_is_one_sentence(run_command, flags, sentence):
    status, out, err = run_command(*flags)
    assert (status, out) == (2, "")
    assert err.startswith(sentence) and err.count("\n") == 1


@pytest.mark.slow
def test_the_picture(run_command, tmp_path):
    pytest.importorskip("matplotlib")
    run_command("--memory-budget", "1GB", "--plot", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("is_known", [False, True])
def test_a_model_of_the_hub_is_not_downloaded(is_known, run_command, tiny, tmp_path, monkeypatch):
    """Its configuration and headers are enough; the shards that are looked at are empty.

    The library may know the model's small files from a `plan` before.
    """
    model, fetched = tiny / "model", []

    def snapshot(name, allow_patterns=(), local_files_only=False):
        small = tmp_path / "small"
        small.mkdir(exist_ok=True)
        if local_files_only:
            if is_known:
                return str(small)
            raise LocalEntryNotFoundError("not here")
        fetched.append((name, tuple(allow_patterns)))
        for file in model.glob("*.json"):
            (small / file.name).write_bytes(file.read_bytes())
        return str(small)

    def metadata(name):
        shards = {}
        for shard in model.glob("*.safetensors"):
            length = 8 + struct.unpack("<Q", shard.read_bytes()[:8])[0]
            tensors = {
                tensor: SimpleNamespace(
                    dtype=info.dtype,
                    shape=info.shape,
                    data_offsets=(info.start - length, info.stop - length),
                )
                for tensor, info in read_header(shard).items()
            }
            shards[shard.name] = SimpleNamespace(tensors=tensors)
        return SimpleNamespace(files_metadata=shards)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    flags = "--json", "--memory-budget", "1GB", "--max-seq-length", 65
    _, there, _ = run_command(*flags, model="someone/model")
    _, here, _ = run_command(*flags)
    assert json.loads(there)["expected_peak_bytes"] == json.loads(here)["expected_peak_bytes"]
    assert [name for name, _ in fetched] == ["someone/model"]
    assert not any("safetensors" in pattern.split(".")[-1] for pattern in fetched[0][1])


def test_a_model_that_is_nowhere(run_command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def nothing(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    status, _, err = run_command(model="someone/model")
    assert status == 2
    assert err.startswith("error: model: 'someone/model' is not a folder here and cannot be read")
