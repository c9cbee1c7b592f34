"""A disk that is full at any operation: one sentence, and nothing half written."""

import errno
import importlib
import shutil

import pytest
from bytes_tokenizer import VOCABULARY, write_tokenizer
from faults import Faults, faulty
from harness import save
from tiny import make_adapter

from mlx_edgelora.export import fusing
from mlx_edgelora.export.peft import export_peft

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMANDS = {
    "fuse": ("fuse", []),
    "peft": ("export.__main__", ["peft"]),
    "gguf": ("export.__main__", ["gguf"]),
    "model": ("export.__main__", ["gguf", "--fused"]),
    "ollama": ("export.__main__", ["ollama"]),
    "import": ("import", []),
}
# Of an interrupted fusion: the shards that are complete.
LEFT = {"fuse": [".written.building"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = folder / "model"
    model.mkdir()
    save(model, "llama", False, vocab_size=VOCABULARY)
    write_tokenizer(model)
    (model / "chat_template.jinja").write_text(CHATML)
    adapter = make_adapter(folder / "adapter", model, ["self_attn.q_proj"], num_layers=1)
    export_peft(adapter, folder / "peft", notify=str)
    return folder


def run(made, target, command):
    module, flags = COMMANDS[command]
    source = "--peft" if command == "import" else "--adapter-path"
    place = made / ("peft" if command == "import" else "adapter")
    main = importlib.import_module(f"mlx_edgelora.{module}").main
    return main([*flags, source, str(place), "--save-path", str(target)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch, capsys, command, every):
    if command not in ("fuse", "peft", "import"):
        pytest.importorskip("gguf")
    monkeypatch.setattr(fusing, "SHARD_BYTES", 200_000)
    target = tmp_path / "written"
    with faulty(Faults()) as counted:
        assert run(made, target, command) == 0
    expected = contents(target)
    assert len(counted.calls) > 5
    for at in range(1 + every // 2, len(counted.calls) + 1, every):
        shutil.rmtree(target)
        capsys.readouterr()
        with faulty(Faults(at, errno.ENOSPC, lasting=True)) as faults:
            status = run(made, target, command)
        error = capsys.readouterr().err
        if status == 0:  # everything was written before
            assert contents(target) == expected
            assert not faults.happened or {*faults.calls[at - 1 :]} <= {"fsync", "unlink"}
            continue
        assert status == 2 and "No space left on device" in error and error.count("\n") == 1
        left = sorted(path.name for path in tmp_path.iterdir())
        assert set(left) <= set(LEFT.get(command, [])), (at, counted.calls[at - 1])
        # The same command goes on as soon as there is room.
        assert run(made, target, command) == 0
        assert contents(target) == expected
