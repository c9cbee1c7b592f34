"""`python -m mlx_edgelora.verify`: compare the gradients of a run with those of plain MLX."""

import argparse
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.config import config_from_cli
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG, MODEL_PATH
from mlx_edgelora.model.checkpoint import resolve_model
from mlx_edgelora.model.hashes import SUMS, hash_shards
from mlx_edgelora.training.inspecting import verification
from mlx_edgelora.training.verdict import table

# --weights without a value.
_CONTENTS = object()
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
    parser.add_argument(
        "--weights",
        nargs="?",
        const=_CONTENTS,
        metavar="WHERE",
        help="Without a value: compare the SHA-256 of the model's shards with those that the Hub "
        f"or a file {SUMS} in its folder recorded, in place of gradients. Exits with 1 if one "
        "differs. With a value: as for mlx-edgelora train.",
    )
    options, rest = parser.parse_known_args(argv)
    if options.weights is _CONTENTS:
        return _compare_contents(rest)
    if options.weights is not None:
        rest += ["--weights", options.weights]
    verdicts = verification(config_from_cli(rest, preset=read_yaml(DEFAULT_CONFIG)))
    print(table(verdicts))
    return MISMATCH if any(verdict.problem for verdict in verdicts) else EQUAL


def _compare_contents(argv: Sequence[str]) -> int:
    config = config_from_cli(argv, preset=read_yaml(DEFAULT_CONFIG))
    status, unknown = EQUAL, False
    for shard in hash_shards(resolve_model(config.model or str(MODEL_PATH))):
        print(f"{shard.found}  {shard.name}", flush=True)
        if shard.is_damaged:
            status = MISMATCH
            print(
                f"damaged: {shard.name} is not the file that {shard.source} names "
                f"({shard.expected}); download it again"
            )
        unknown = unknown or shard.expected is None
    if unknown:
        print(
            f"No hash was recorded of some shards. To compare them later, write the lines above "
            f"to {SUMS} in the folder of the model."
        )
    elif status == EQUAL:
        print("Every shard is the file that was recorded.")
    return status


if __name__ == "__main__":
    sys.exit(main())
