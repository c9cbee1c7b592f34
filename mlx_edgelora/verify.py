"""`python -m mlx_edgelora.verify`: compare the gradients of a run with those of plain MLX."""

import argparse
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.config import config_from_cli
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG
from mlx_edgelora.training.inspecting import verification
from mlx_edgelora.training.verdict import table

# Exit statuses in addition to those of every command.
EQUAL, MISMATCH = 0, 1


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 if all gradients agree, 1 if not (`mlx_edgelora.command`)."""
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora verify",
        usage="%(prog)s [options of mlx-edgelora train]",
        description="Compare the gradients of a training run with those of plain MLX on this "
        "machine: a block of each kind, and the head with the loss. Weights are read block by "
        "block, so the model need not fit into memory. Takes every option of mlx-edgelora train. "
        "Without --data every row has --max-seq-length tokens. Exits with 1 if gradients differ.",
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(argv)
    verdicts = verification(config_from_cli(rest, preset=read_yaml(DEFAULT_CONFIG)))
    print(table(verdicts))
    return MISMATCH if any(verdict.problem for verdict in verdicts) else EQUAL


if __name__ == "__main__":
    sys.exit(main())
