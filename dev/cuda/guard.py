"""A pytest plugin (`-p guard`) for CUDA, where an error of a kernel ends a process's use of the GPU.

Every test after it would fail. Its process ends instead, pytest-xdist blames the test and goes on
with another process; the error is added to the file that $ENDED names.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Look whether the GPU still answers after each test."""
    result = yield
    try:
        mx.eval(mx.zeros(8) + 1)
    except RuntimeError as error:
        with Path(os.environ["ENDED"]).open("a") as file:
            file.write(f"{item.nodeid}: {error}\n")
        os._exit(1)
    return result
