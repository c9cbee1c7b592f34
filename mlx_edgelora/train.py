"""`python -m mlx_edgelora.train`: fine-tune a model from the command line."""

import shlex
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.config import config_from_cli
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.embedded import DEFAULT_CONFIG, MODEL_PATH, demonstrate
from mlx_edgelora.training.failures import explain_failures
from mlx_edgelora.training.finetune import finetune
from mlx_edgelora.training.resuming import saved_options


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    config = config_from_cli(argv, read_yaml(DEFAULT_CONFIG), saved_options)
    result = finetune(config)
    if result is not None and config.model is None and config.data is None:
        print("\nWhat the adapter changed, asked through mlx-lm:")
        with explain_failures(f"the adapter is in {result.adapter_path}"):
            print(demonstrate(result.adapter_path))
    elif result is not None:
        model = ["--model", config.model or MODEL_PATH, "--adapter-path", result.adapter_path]
        words = shlex.join(["mlx_lm.generate", *map(str, model)])
        print(f'\nTry it:\n  {words} --prompt "..."')
    return 0


if __name__ == "__main__":
    sys.exit(main())
