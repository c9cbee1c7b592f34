"""A model that cannot be walked is refused by every command, in the same sentence."""

import json
import subprocess
import sys

import pytest
from architectures import CONFIGS
from tiny import make_data, make_model

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune, plan, train, verify
from mlx_edgelora.benchmark import __main__ as benchmark

SENTENCE = (
    "error: iquestloopcoder: block 0 (TransformerBlock) cannot be trained block by block: the "
    "model does not call it from its list of blocks; train this architecture with mlx_lm.lora\n"
)


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    root = tmp_path_factory.mktemp("refused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "iquestloopcoder", {})
        make_model(root / "model", "iquestloopcoder")
    make_data(root / "data")
    return root


@pytest.mark.parametrize("command", [train, plan, verify, benchmark], ids=lambda c: c.__name__)
def test_every_command_says_so_and_exits_with_2(command, refused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", refused / "model", "--data", refused / "data"]
    if command is not benchmark:
        flags += ["--num-layers", "-1", "--adapter-path", tmp_path / "adapters"]
    assert command.main(list(map(str, flags))) == 2
    # Before it, the benchmark may advise to install a faster BLAS.
    assert capsys.readouterr().err.endswith(SENTENCE)
    assert not (tmp_path / "adapters").exists()


def test_a_test_alone_says_so_too(refused):
    config = TrainConfig(
        model=str(refused / "model"), data=str(refused / "data"), test=True, adapter_path=""
    )
    with pytest.raises(EdgeLoraError) as raised:
        finetune(config)
    assert f"error: {raised.value}\n" == SENTENCE


def test_an_architecture_that_leaves_the_process_is_refused(tmp_path):
    """mlx-lm's olmo calls exit where its package is missing."""
    make_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "olmo"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "mlx_edgelora.plan", "--model", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: mlx-lm cannot build this model (SystemExit")
