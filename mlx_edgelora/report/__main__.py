"""`mlx-edgelora report`: make a page about a run from its log."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import path_argument
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.report.page import check_target, write_report

EXAMPLE = "mlx-edgelora-report.html"
# Number of steps of the example run.
STEPS = 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise `EdgeLoraError` for a wrong option."""
        raise EdgeLoraError(f"command line: {message}; --help lists the options")


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    options = _parser().parse_args(argv)
    log = None if options.log is None else Path(options.log)
    target = Path(options.output or (EXAMPLE if log is None else log.with_suffix(".html")))
    if log is not None and target.resolve() == log.resolve():
        raise EdgeLoraError(f"--output: {target} is the log, expected another file")
    check_target(target)
    if log is None:
        _example(target)
    else:
        _report(log, target)
        print(f"The report is in {target}")
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="mlx-edgelora report",
        description="Make a page about a run from the log that train --log wrote: losses, speed, "
        "memory against the budget, and the plan. It is one HTML file, which loads nothing from a "
        "network. Of several runs in a log the last one is shown. Without a log the tiny model of "
        f"this package is trained for {STEPS} steps, as an example.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "log", nargs="?", type=path_argument, metavar="LOG", help="JSONL file of a run"
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="FILE",
        help=f"HTML file to write (default: the log's name with .html, or {EXAMPLE})",
    )
    return parser


def _report(log: Path, target: Path) -> None:
    try:
        with open(log, "rb") as lines:
            write_report(lines, str(log), target)
    except OSError as error:
        raise EdgeLoraError(
            f"{log}: cannot be read ({error.strerror}), expected the file that a run wrote with "
            "--log"
        ) from error


def _example(target: Path) -> None:
    # Imported here because a report of an existing log does not need them.
    from mlx_edgelora.config import config_from_cli  # noqa: PLC0415
    from mlx_edgelora.config.yaml_file import read_yaml  # noqa: PLC0415
    from mlx_edgelora.embedded import DEFAULT_CONFIG  # noqa: PLC0415
    from mlx_edgelora.train import run  # noqa: PLC0415

    config = config_from_cli([], preset=read_yaml(DEFAULT_CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        example = {"iters": STEPS, "steps_per_report": 1, "steps_per_eval": 5}
        run(
            replace(config, adapter_path=folder, report=str(target), **example), keeps_adapter=False
        )


if __name__ == "__main__":
    sys.exit(main())
