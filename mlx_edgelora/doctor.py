"""`python -m mlx_edgelora.doctor`: measure a machine in two minutes, and write a report."""

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mlx_edgelora.checkup.caches import clean, entries
from mlx_edgelora.checkup.job import Checkup, Sizes, default_sizes, environment_variable
from mlx_edgelora.checkup.report import as_json, lines_of, make_report, problems
from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import path_argument
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import footprint
from mlx_edgelora.measure.text import say, wrapped
from mlx_edgelora.storage.files import make_folder, user_cache, write_atomically
from mlx_edgelora.storage.temporaries import scratch_folder

FILE = "mlx-edgelora-report.json"
# Exit statuses in addition to those of every command.
PASSED, FAILED = 0, 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise `EdgeLoraError` for a wrong option."""
        raise EdgeLoraError(f"command line: {message}; --help lists the options")


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """Run the command; returns 1 if a check failed, else a status of `mlx_edgelora.command`.

    Args:
        argv: arguments; those of the process by default.
        sizes: sizes of the checks; None for those of `default_sizes`.
    """
    return command(lambda arguments: _run(arguments, sizes or default_sizes()))(argv)


def _run(argv: Sequence[str], sizes: Sizes) -> int:
    options = _parser().parse_args(argv)
    cache = Path(options.cache_dir) if options.cache_dir else user_cache()
    if options.clean:
        return _clean(cache, Path(options.spill_dir), options.report)
    file = None if options.report is None else Path(options.report)
    if file is not None:
        _check_file(file)
    with _scratch(options.spill_dir) as folder:
        job = Checkup(folder, sizes, footprint(), cache)
        print("Checking this machine. It takes about two minutes, and nothing is sent.")
        if sizes.seconds > Sizes.seconds:
            print("The first time it takes up to ten, because MLX compiles its kernels for CUDA.")
        report = make_report(job, lambda report: _print_and_write(report, file))
    found = problems(report)
    print(f"\n{'Problems found:' if found else 'Nothing failed.'}")
    for line in found:
        print(wrapped(f"  {line}"))
    print(f"\n{_next_steps(file)}")
    return FAILED if found else PASSED


def _parser() -> _Parser:
    parser = _Parser(
        prog="mlx-edgelora doctor",
        description="Measure what this machine can do, and whether training on it gives the "
        "gradients of plain MLX and stays within its memory budgets. It takes about two minutes "
        "and uses no network. The report contains no user, host or folder names. Exits with 1 if "
        "something failed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const=FILE,
        type=path_argument,
        metavar="FILE",
        help=f"write the report to this file as well (default: {FILE} in this folder)",
    )
    parser.add_argument(
        "--spill-dir",
        default=tempfile.gettempdir(),
        type=path_argument,
        metavar="FOLDER",
        help="folder on the disk that is measured (default: the system's temporary one)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        help="folder of the caches, if runs had another --cache-dir (default: the user's cache)",
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="only remove caches and left-overs of dead runs, except what a process uses",
    )
    return parser


def _clean(cache: Path, scratch: Path, report: str | None) -> int:
    """Remove what no process uses; nothing is measured."""
    if report is not None:
        raise EdgeLoraError("command line: --clean measures nothing; leave out --report")
    lines = list(clean(entries(cache, [scratch, Path(tempfile.gettempdir())])))
    for line in lines or [f"nothing to remove in {cache}"]:
        say(line)
    return FAILED if any(line.startswith("cannot") for line in lines) else PASSED


def _check_file(file: Path) -> None:
    """Check that the report can be written, before two minutes of measuring."""
    if file.is_dir():
        raise EdgeLoraError(f"--report: {file} is a folder, expected a file; name one in it")
    if not file.parent.is_dir():
        raise EdgeLoraError(
            f"--report: {file.parent} is not a folder; choose a file in an existing folder"
        )
    make_folder(file.parent)


@contextmanager
def _scratch(folder: str) -> Iterator[Path]:
    """A temporary folder, also used as cache, so that earlier measurements have no effect."""
    with ExitStack() as stack:
        try:
            if not Path(folder).is_dir():
                raise NotADirectoryError(errno.ENOENT, os.strerror(errno.ENOENT))
            scratch = stack.enter_context(scratch_folder(Path(folder)))
        except OSError as error:
            raise EdgeLoraError(
                f"--spill-dir: {folder} cannot be written ({error.strerror}); choose another folder"
            ) from error
        stack.enter_context(environment_variable("XDG_CACHE_HOME", str(scratch)))
        yield scratch


def _print_and_write(report: Mapping[str, Any], file: Path | None) -> None:
    """Print the last section of the report, and write all sections to the file."""
    name, section = list(report["sections"].items())[-1]
    print("\n" + "\n".join(lines_of(name, section)), flush=True)
    if file is not None:
        write_atomically({file: lambda target: target.write(as_json(report))})


def _next_steps(file: Path | None) -> str:
    if file is None:
        return "Run it with --report to write a file that you can send to the project."
    return (
        f"The report is in {file}\n"
        "Please paste it into an issue of the project, or add it to\n"
        "benchmarks/results/macs/ in a pull request."
    )


if __name__ == "__main__":
    sys.exit(main())
