"""`python -m mlx_edgelora.plan`: find out whether a run fits, without reading any weights."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mlx_edgelora.command import command
from mlx_edgelora.config import config_from_cli
from mlx_edgelora.config.kinds import path_argument
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.files import write_atomically
from mlx_edgelora.training.inspecting import plan_report
from mlx_edgelora.training.opening import has_data

# Exit statuses in addition to those of every command.
FITS, DOES_NOT_FIT = 0, 1


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 if the run fits, 1 if not, else as `mlx_edgelora.command`."""
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora plan",
        usage="%(prog)s [options] [options of mlx-edgelora train]",
        description="Tell whether a training run fits into memory, and how it would be computed. "
        "No weights are read: of a model on the Hub only the configuration and the headers are "
        "downloaded. Takes every option of mlx-edgelora train as well. Without --data every row "
        "has --max-seq-length tokens. Exits with 1 if the run does not fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--plot",
        type=path_argument,
        metavar="FILE",
        help="Draw peak and time by budget (needs the plot extra).",
    )
    parser.add_argument(
        "--labelled",
        type=float,
        metavar="SHARE",
        help="Without --data: fraction of the tokens with a label. Default: 1.0.",
    )
    own, rest = parser.parse_known_args(argv)
    if own.labelled is not None and not 0 < own.labelled <= 1:
        raise EdgeLoraError(
            f"--labelled: got {own.labelled}, expected a number above 0 and at most 1"
        )
    if own.plot and find_spec("matplotlib") is None:
        raise EdgeLoraError(
            "--plot: matplotlib is not installed; run `pip install 'mlx-edgelora[plot]'`"
        )
    config = config_from_cli(rest, preset=read_yaml(DEFAULT_CONFIG))
    if own.labelled is not None and has_data(config):
        raise EdgeLoraError(
            f"--labelled: got {own.labelled} for rows that are given, expected nothing: their "
            "own labels count; leave it out, or name a --model without --data"
        )
    report = plan_report(config, 1.0 if own.labelled is None else own.labelled)
    print(report.json() if own.json else report.table())
    if own.plot:
        write_atomically({Path(own.plot): report.plot})
    return FITS if report.fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
