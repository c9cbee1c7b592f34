"""Arrays whose values come later."""

import gc
import os
import subprocess
import sys
import tempfile
import time

import mlx.core as mx
import pytest

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.deferred import DeferredArray


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_graph_is_built_before_the_values_are_known(dtype):
    x, w = mx.random.normal((3, 5)).astype(dtype), mx.random.normal((5, 4)).astype(dtype)
    value = mx.random.normal((3, 4)).astype(dtype)

    def function(x, w):
        return mx.tanh(x @ w)

    promise = DeferredArray((3, 4), dtype)
    (out,), found = mx.vjp(function, [x, w], [promise.array])
    mx.eval(out)
    promise.fill(value)
    _, expected = mx.vjp(function, [x, w], [value])
    for got, wanted in zip(found, expected, strict=True):
        assert mx.array_equal(got, wanted)


def test_nobody_gets_values_before_they_are_known():
    """In another process: MLX can lose count of its tasks when one fails."""
    code = """
import mlx.core as mx
from mlx_edgelora.storage.deferred import DeferredArray

mx.eval(DeferredArray((3, 4), mx.float32).array + 1)
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode and run.stderr.splitlines()[-1].startswith("RuntimeError: [read]")


def test_other_values_than_promised_are_refused():
    promise = DeferredArray((3, 4), mx.float32)
    for value in (mx.ones((4, 3)), mx.ones((3, 4), mx.float16)):
        with pytest.raises(ValueError, match=r"expected .*float32 "):
            promise.fill(value)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()  # what earlier tests left
    before = len(os.listdir("/dev/fd"))
    for kept in (True, False):
        promise = DeferredArray((3, 4), mx.float32)
        assert not list(tmp_path.iterdir())
        if kept:
            promise.fill(mx.ones((3, 4)))
            mx.eval(promise.array)
        del promise
    for _ in range(200):  # MLX lets go of the file in a thread of its own
        if len(os.listdir("/dev/fd")) == before:
            break
        time.sleep(0.01)
    assert len(os.listdir("/dev/fd")) == before


def test_a_folder_that_takes_no_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(EdgeLoraError, match="nowhere: cannot be written"):
        DeferredArray((3, 4), mx.float32)
