"""`python -m mlx_edgelora.import`: turn an adapter of Hugging Face PEFT into one of mlx-lm."""

import argparse
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import path_argument
from mlx_edgelora.export.peft_import import import_peft
from mlx_edgelora.training.failures import explain_failures


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora import",
        usage="%(prog)s --peft FOLDER [options]",
        description="Turn an adapter of Hugging Face PEFT into one of mlx-lm, to generate with it "
        "or to train on. No weights of the base model are read.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--peft", type=path_argument, metavar="FOLDER", help="Folder of the PEFT adapter."
    )
    parser.add_argument(
        "--model",
        type=path_argument,
        metavar="MODEL",
        help="Model folder or Hugging Face name. Default: the model that the PEFT adapter names.",
    )
    parser.add_argument(
        "--save-path",
        type=path_argument,
        default="adapters",
        metavar="FOLDER",
        help="Folder to write to; it must not exist. Default: adapters.",
    )
    options = parser.parse_args(argv)
    if options.peft is None:
        parser.print_help()
        return 0
    with explain_failures(f"{options.save_path} was not written"):
        path = import_peft(options.peft, options.save_path, options.model)
    model = f" --model {options.model}" if options.model else ""
    print(f"adapter in {path}")
    print(f'\nTry it:\n  mlx-edgelora generate{model} --adapter-path {path} --prompt "..."')
    return 0


if __name__ == "__main__":
    sys.exit(main())
