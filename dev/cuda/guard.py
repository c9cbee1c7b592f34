"""A pytest plugin (`-p guard`) for a machine that is lent for minutes.

Failures are written when they happen, to the file that $FAILURES names: a run that is cut off has
no summary. An error of a kernel of CUDA ends a process's use of the GPU, and every test after it
would fail: the process ends instead, pytest-xdist blames the test and goes on with another one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

FAILURES = Path(os.environ["FAILURES"])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a failure, in the process that collects them."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        text = f"==== {report.nodeid} [{report.when}]\n{report.longreprtext[-2500:]}\n"
        with FAILURES.open("a") as file:
            file.write(text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are named in the file that $ONLY names, if any."""
    if file := os.environ.get("ONLY"):
        names = set(Path(file).read_text().splitlines())
        others = [item for item in items if item.nodeid not in names]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.nodeid in names]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Look whether the GPU still answers after each test."""
    result = yield
    try:
        mx.eval(mx.zeros(8) + 1)
    except RuntimeError as error:
        with FAILURES.with_suffix(".ended").open("a") as file:
            file.write(f"{item.nodeid}: {error}\n")
        os._exit(1)
    return result
