"""The command line of the benchmark."""

import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# As in the processes of the contenders (`worker.py`), because they plan with the rates of the
# machine that are measured in this process.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from mlx_edgelora.benchmark.options import options_from_cli
from mlx_edgelora.benchmark.report import BenchmarkReport
from mlx_edgelora.benchmark.run import run
from mlx_edgelora.command import command
from mlx_edgelora.storage.files import Writer, write_atomically

# Additional exit status of this command: a measurement is not valid.
INVALID = 1


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status (`mlx_edgelora.command`)."""
    options = options_from_cli(argv)
    line = shlex.join(["python", "-m", "mlx_edgelora.benchmark", *argv])

    def keep(report: BenchmarkReport, step_memory: bytes | None = None) -> None:
        if options.output is not None:
            write(report, step_memory, options.output, options.shape)

    report, step_memory = run(options, line, log, keep)
    print(report.text())
    keep(report, step_memory)
    return 0 if report.valid else INVALID


def log(line: str) -> None:
    """Print a progress message to standard error."""
    print(line, file=sys.stderr, flush=True)


def write(
    report: BenchmarkReport, step_memory: bytes | None, folder: Path, shape: str | None
) -> None:
    """Replace the files of a report in a folder."""
    writers: dict[Path, Writer] = {}

    def add(name: str, content: bytes) -> None:
        writers[folder / name] = lambda file: file.write(content)

    add("results.md", report.markdown().encode())
    add("results.json", report.json().encode())
    if step_memory is not None:
        add("step-memory.png", step_memory)
    if find_spec("matplotlib") is not None and report.contexts:
        from mlx_edgelora.benchmark import pictures  # noqa: PLC0415 - an optional dependency

        writers[folder / "peak-by-context.png"] = pictures.peak_by_context(report, shape)
        writers[folder / "time-against-peak.png"] = pictures.time_against_peak(report)
    write_atomically(writers)


if __name__ == "__main__":
    sys.exit(main())
