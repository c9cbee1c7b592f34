"""`python -m mlx_edgelora.fuse`: merge an adapter into its model, tensor by tensor."""

import argparse
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import add_model, path_argument
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.fusing import fuse
from mlx_edgelora.measure.meter import peak_memory
from mlx_edgelora.measure.units import size
from mlx_edgelora.training.failures import explain_failures


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora fuse",
        usage="%(prog)s [options]",
        description="Merge an adapter into its model, in the model's own quantization. Tensors "
        "are computed and written one after the other, so any model fits; the result is that of "
        "mlx_lm.fuse. An interrupted run goes on where it stopped.",
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument(
        "--adapter-path",
        nargs="+",
        default=["adapters"],
        type=path_argument,
        metavar="FOLDER",
        help="Folders of adapters; several are added up. Default: adapters.",
    )
    parser.add_argument(
        "--adapter-weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="What each adapter is multiplied by, such as 0.7 0.3. Default: 1 each.",
    )
    parser.add_argument(
        "--save-path",
        default="fused_model",
        type=path_argument,
        metavar="FOLDER",
        help="Folder to write to; it must not exist. Default: fused_model.",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="Write unpacked weights of a quantized model."
    )
    options = parser.parse_args(argv)
    weights = options.adapter_weights
    if weights is not None and len(weights) != len(options.adapter_path):
        raise EdgeLoraError(
            f"--adapter-weights: got {len(weights)} for {len(options.adapter_path)} adapters, "
            "expected one for each"
        )
    try:
        with explain_failures(f"{options.save_path} was not written"):
            path = fuse(
                options.model, options.adapter_path, options.save_path, weights, options.dequantize
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        raise
    print(f"fused model in {path} (peak memory {size(peak_memory())})")
    print(f'\nTry it:\n  mlx-edgelora generate --model {path} --prompt "..."')
    return 0


if __name__ == "__main__":
    sys.exit(main())
