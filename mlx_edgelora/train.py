"""`python -m mlx_edgelora.train`: fine-tune a model from the command line."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlx_edgelora.command import command
from mlx_edgelora.config import TrainConfig, config_from_cli
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG, demonstrate
from mlx_edgelora.measure.text import COLUMNS, wrapped
from mlx_edgelora.training.failures import explain_failures
from mlx_edgelora.training.finetune import finetune
from mlx_edgelora.training.group import Group
from mlx_edgelora.training.log import recorded
from mlx_edgelora.training.resuming import saved_options


def run(config: TrainConfig, keeps_adapter: bool = True) -> None:
    """Train or test, then print the path of the adapter and a command to try it.

    With the package's own model and data, answers before and after training are printed too.

    Args:
        config: options of the run.
        keeps_adapter: whether the adapter stays after the command, so that it can be tried.
    """
    group = Group.joined()
    config = group.own_options(config)
    with recorded(config) as log:
        result = finetune(config, log=log)
        if not group.leads:
            return
        embedded = config.model is None and config.data is None and not config.compares_answers
        if result is not None and embedded:
            print("\nWhat the adapter changed, asked through mlx-lm:")
            with explain_failures(f"the adapter is in {result.adapter_path}"):
                shown = demonstrate(result.adapter_path)
            print(wrapped(str(shown)))
            if log is not None:
                log.note("answers", asdict(shown))
        if result is not None and keeps_adapter:
            print(f"\nThe adapter is in {result.adapter_path}. Try it:")
            print(command_to_try(result.adapter_path))
    if config.report is not None:
        print(f"\nThe report is in {config.report}")


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    run(config_from_cli(argv, read_yaml(DEFAULT_CONFIG), saved_options))
    return 0


def command_to_try(adapter_path: Path) -> str:
    """A command that answers a prompt with the adapter; a long one is split into several lines."""
    path = shlex.quote(str(adapter_path))
    words = ["mlx-edgelora generate", f"--adapter-path {path}", '--prompt "..."']
    line = f"  {' '.join(words)}"
    return line if len(line) <= COLUMNS else "  " + " \\\n      ".join(words)


if __name__ == "__main__":
    sys.exit(main())
