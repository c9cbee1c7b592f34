"""Publishing with an API object in place of the Hub: what is sent, and what is not."""

import json
from types import SimpleNamespace

import pytest
import yaml
from tiny import make_adapter, make_model

from mlx_edgelora.export import hub
from mlx_edgelora.export.__main__ import main


class FakeApi:
    def __init__(self, fails=None):
        self.calls, self.fails = [], fails

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.fails:
            raise self.fails
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.calls.append(("upload", repo_id, files))


@pytest.fixture
def api(monkeypatch):
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    return fake


@pytest.fixture
def adapter(tmp_path):
    model = make_model(tmp_path / "model", "llama", quantized=False)
    folder = make_adapter(tmp_path / "adapter", model, ["self_attn.q_proj"])
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"data": str(tmp_path / "secret-data"), "learning_rate": 3e-4, "iters": 40}
    config |= {"system_prompt": "my secret prompt", "train_on": "a | b <script>"}
    file.write_text(json.dumps(config))
    state = {
        "step": 40,
        "train_loss": 1.23456,
        "val_loss": None,
        "fingerprints": {"data": "a" * 64},
    }
    (folder / "checkpoints/0000040").mkdir(parents=True)
    (folder / "checkpoints/0000040/run.json").write_text(json.dumps(state))
    (folder / "checkpoints/0000020").mkdir()
    (folder / "checkpoints/0000020/run.json").write_text(json.dumps(state | {"step": 20}))
    return folder


def command(tmp_path, adapter, *options):
    common = ["--adapter-path", str(adapter), "--save-path", str(tmp_path / "out")]
    return ["peft", *common, "--push-to-hub", "me/mine", *options]


def test_the_folder_is_sent_with_a_card(tmp_path, adapter, api, capsys):
    assert main(command(tmp_path, adapter, "--base-model", "meta-llama/Llama-3.2-1B")) == 0
    assert "published: https://hub.example/me/mine" in capsys.readouterr().out
    (create, repo, options), (_, _, files) = api.calls
    assert (create, repo, options) == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("meta-llama/Llama-3.2-1B", "peft")
    assert "| step | 40 |" in card and "| train loss | 1.235 |" in card
    assert "| learning_rate | 0.0003 |" in card and "| lora rank | 4 |" in card
    assert "a" * 64 in card and "local files, not published" in card and "| mlx-lm | " in card
    assert r"a \| b \<script\>" in card
    for files_of in files.values():
        for secret in (str(tmp_path), "secret", "hf_secret"):
            assert secret.encode() not in files_of


def test_nothing_is_sent_unless_asked(tmp_path, adapter, api):
    assert main(command(tmp_path, adapter)[:5]) == 0
    assert api.calls == [] and not (tmp_path / "out/README.md").exists()


@pytest.mark.parametrize("case", ["no token", "no name", "a folder as base"])
def test_what_is_wrong_is_said_before_anything_is_done(
    tmp_path, adapter, api, monkeypatch, capsys, case
):
    arguments = command(tmp_path, adapter, "--base-model", "meta-llama/Llama-3.2-1B")
    message = "needs your token of the Hugging Face Hub"
    if case == "no token":
        monkeypatch.setattr(hub, "get_token", lambda: None)
    elif case == "no name":
        arguments[arguments.index("me/mine")] = "me/my adapter"
        message = "expected a name such as me/my-adapter"
    else:
        arguments, message = arguments[:-2], "is a folder of this machine"
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert api.calls == [] and not (tmp_path / "out").exists()


def test_an_upload_that_fails(tmp_path, adapter, api, capsys):
    api.fails = OSError("no route")
    assert main(command(tmp_path, adapter, "--base-model", "a/b")) == 2
    err = capsys.readouterr().err
    assert "no route" in err and "hf upload me/mine" in err
    assert (tmp_path / "out/adapter_config.json").exists()


def test_a_card_without_checkpoints_and_with_damaged_ones(adapter):
    (adapter / "checkpoints/0000040/run.json").write_text("[1, 2")
    card = hub.model_card(adapter, "ollama", None, "me/mine")
    assert "## Losses" not in card and "not published" in card and "gguf" in card
    assert SimpleNamespace(**yaml.safe_load(card.split("---")[1])).tags
