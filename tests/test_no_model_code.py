"""Nothing that comes with a model runs, in any command, whatever standard input answers."""

import json
import sys

import pytest
from tiny import make_adapter, make_data, make_model

from mlx_edgelora import plan, train, verify
from mlx_edgelora.benchmark import __main__ as benchmark
from mlx_edgelora.data import hub
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.fuse import main as fuse
from mlx_edgelora.generate import main as generate
from mlx_edgelora.preview import command as preview

EVIL = """open({ran!r}, "w").close()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilConfig(LlamaConfig): pass
"""
COMMANDS = {
    "train": train.main,
    "plan": plan.main,
    "data": preview.main,
    "generate": generate,
    "fuse": fuse,
    "verify": verify.main,
    "benchmark": benchmark.main,
}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A model whose tokenizer and configuration have code, and a standard input that says yes."""
    folder = make_model(tmp_path / "model", "llama")
    make_data(tmp_path / "data")
    make_adapter(tmp_path / "adapters", folder)
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    for name, code in (
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.EvilTokenizer"] * 2}),
        ("config.json", {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": "evil.EvilTokenizer"}),
    ):
        content = json.loads((folder / name).read_text()) | {"auto_map": code}
        if name == "tokenizer_config.json":
            content |= {"tokenizer_class": "EvilTokenizer"}
        else:  # a llama for mlx-lm, and unknown to transformers, which therefore asks
            content |= {"model_type": "xverse"}
        (folder / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    return tmp_path, asked


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_asks_or_runs_it(name, evil, capsys):
    root, asked = evil
    flags = ["--model", "model"]
    if name in ("train", "plan", "data", "verify", "benchmark"):
        flags += ["--data", "data"]
    if name in ("train", "plan", "data", "verify"):
        flags += ["--num-layers", "-1", "--iters", "1", "--adapter-path", "new"]
    if name in ("generate", "fuse"):
        flags += ["--adapter-path", "adapters"]
    status = COMMANDS[name](flags)
    printed = capsys.readouterr()
    assert not (root / "ran").exists()
    assert not asked
    # Some versions of transformers refuse the tokenizer, and others take tokenizer.json alone.
    assert status == 0 or (status == 2 and "the tokenizer cannot be loaded" in printed.err)
    if name == "fuse":
        assert not list((root / "fused_model").glob("*.py"))


def test_a_model_file_is_refused(evil):
    root, _ = evil
    path = root / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_file": "evil.py"}))
    for name in ("train", "generate", "fuse"):
        assert COMMANDS[name](["--model", "model"]) == 2
    assert not (root / "ran").exists()


def test_code_of_a_data_set_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", plan)  # any module: it is not used
    with pytest.raises(EdgeLoraError, match="code of a data set is never run"):
        hub._load_from_hub("hf_dataset: 'x'", "x", {"trust_remote_code": True}, split="train")
