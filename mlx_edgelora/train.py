"""`python -m mlx_edgelora.train`: fine-tune a model from the command line."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict

from mlx_edgelora.config import TrainConfig, config_from_cli
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG, MODEL_PATH, demonstrate
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.training.failures import explain_failures
from mlx_edgelora.training.finetune import finetune
from mlx_edgelora.training.log import recorded


def run(config: TrainConfig) -> None:
    """Do what the options say; then print what was gained, or the command that tries it."""
    with recorded(config) as log:
        result = finetune(config, log=log)
        if result is not None and config.model is None and config.data is None:
            print("\nWhat the adapter changed, asked through mlx-lm:")
            with explain_failures(f"the adapter is in {result.adapter_path}"):
                shown = demonstrate(result.adapter_path)
            print(shown)
            if log is not None:
                log.note("answers", asdict(shown))
        elif result is not None:
            command = ["--model", config.model or MODEL_PATH, "--adapter-path", result.adapter_path]
            words = shlex.join(["mlx_lm.generate", *map(str, command)])
            print(f'\nTry it:\n  {words} --prompt "..."')
    if config.report is not None:
        print(f"\nThe report is in {config.report}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for what the user can mend, 130 for ^C.

    141 means that the reader of the output has exited, as with `| head`.
    """
    try:
        config = config_from_cli(
            sys.argv[1:] if argv is None else argv, preset=read_yaml(DEFAULT_CONFIG)
        )
        run(config)
    except EdgeLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the output has exited; Python would report it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
