"""Files that are read more than once in a run must stay what they were at first."""

import os
import shutil
from contextlib import closing

import mlx.core as mx
import pytest
from harness import engine, random_batch, save

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model import checkpoint, loading
from mlx_edgelora.training.adapters import read_adapter_weights


def overwritten(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def replaced(file):
    other = file.with_name("other")
    shutil.copy2(file, other)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize("change", [overwritten, replaced])
@pytest.mark.parametrize("part", ["model.layers", "model.embed_tokens", "lm_head"])
def test_a_shard_that_changes_is_an_error_not_a_wrong_gradient(part, change, tmp_path):
    """Of blocks, of the embedding or of the head: each is read again for every batch."""
    folder, batch = save(tmp_path, "llama", True), random_batch()
    whole = mx.load(str(folder / "model.safetensors"))
    for number, names in enumerate(
        ([n for n in whole if n.startswith(part)], [n for n in whole if not n.startswith(part)])
    ):
        shard = folder / f"model-0000{number + 1}-of-00002.safetensors"
        mx.save_safetensors(str(shard), {name: whole[name] for name in names})
    for file in ("model.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    with closing(engine(folder)) as ours:
        ours.value_and_grad(batch)
        change(folder / "model-00001-of-00002.safetensors")
        with pytest.raises(EdgeLoraError, match=r"00001-of-00002.safetensors: the file changed"):
            ours.value_and_grad(batch)
        with pytest.raises(EdgeLoraError, match=r"00001-of-00002.safetensors: the file changed"):
            ours.loss(batch)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("file", "change", "when"),
    [
        ("config.json", replaced, (checkpoint, "load_model")),
        ("model.safetensors", overwritten, (loading, "find_head")),
    ],
    ids=["config.json", "model.safetensors"],
)
def test_a_model_that_changes_while_it_is_opened_is_an_error(
    file, change, when, streamed, tmp_path, monkeypatch
):
    folder, original = save(tmp_path, "llama", True), getattr(*when)

    def changing(*args, **kwargs):
        change(folder / file)
        return original(*args, **kwargs)

    monkeypatch.setattr(*when, changing)
    with pytest.raises(EdgeLoraError, match=rf"{file}: the file changed"):
        engine(folder, streamed=streamed).value_and_grad(random_batch())


def test_an_adapter_that_changes_while_it_is_read_is_an_error(tmp_path):
    file = tmp_path / "adapters.safetensors"
    arrays = {name: mx.ones((30, 30)) for name in ("a", "b")}
    mx.save_safetensors(str(file), arrays)
    reading = read_adapter_weights(file, arrays)
    next(reading)
    overwritten(file)
    with pytest.raises(EdgeLoraError, match=r"adapters.safetensors: the file changed"):
        next(reading)
