"""`python -m mlx_edgelora.export`: write an adapter in the format of another program."""

import argparse
import sys
from collections.abc import Sequence

from mlx_edgelora.command import command
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.gguf_files import OUTTYPES, export_gguf
from mlx_edgelora.export.ollama import export_ollama
from mlx_edgelora.export.peft import export_peft
from mlx_edgelora.measure.meter import peak_memory
from mlx_edgelora.measure.units import size
from mlx_edgelora.training.failures import explain_failures

FORMATS = "peft", "gguf", "ollama"
# Options that only some formats have.
_ONLY = {"base_model": ("peft", "ollama"), "fused": ("gguf",), "outtype": ("gguf", "ollama")}


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (`mlx_edgelora.command`)."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.format is None:
        parser.print_help()
        return 0
    for name, formats in _ONLY.items():
        if options.format not in formats and getattr(options, name):
            raise EdgeLoraError(
                f"--{name.replace('_', '-')}: has no meaning for {options.format}, expected it "
                f"with {' or '.join(formats)} only; leave it out"
            )
    options.save_path = options.save_path or f"exported_{options.format}"
    with explain_failures(f"{options.save_path} was not written"):
        {"peft": _peft, "gguf": _gguf, "ollama": _ollama}[options.format](options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-edgelora export",
        usage="%(prog)s FORMAT [options]",
        description="Write an adapter in the format of another program: peft, a folder that "
        "Hugging Face PEFT loads; gguf, a LoRA adapter or a merged model for llama.cpp; "
        "ollama, a GGUF file and a Modelfile.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("format", nargs="?", choices=FORMATS, metavar="FORMAT", help=f"{', '.join(FORMATS)}.")
    add(
        "--model",
        metavar="MODEL",
        help="Model folder or Hugging Face name. Default: the model the adapter was trained on.",
    )
    add(
        "--adapter-path",
        default="adapters",
        metavar="FOLDER",
        help="Folder of an adapter. Default: adapters.",
    )
    add(
        "--save-path",
        metavar="FOLDER",
        help="Folder to write to; it must not exist. Default: exported_FORMAT.",
    )
    add(
        "--base-model",
        metavar="NAME",
        help="peft: the model that PEFT is to load the adapter onto, such as the unquantized "
        "original; default: --model. ollama: Ollama's name of the base model, for the adapter "
        "alone; default: none, the merged model.",
    )
    add(
        "--fused",
        action="store_true",
        help="gguf: write the whole model with the adapter merged into it. Default: the adapter.",
    )
    add(
        "--outtype",
        choices=OUTTYPES,
        help="gguf, ollama: dtype of matrices. Default: f16, but f32 for an adapter in GGUF.",
    )
    return parser


def _peft(options: argparse.Namespace) -> None:
    path = export_peft(options.adapter_path, options.save_path, options.model, options.base_model)
    print(f"PEFT adapter in {path}")
    print(f'\nLoad it:\n  peft.AutoPeftModelForCausalLM.from_pretrained("{path}")')


def _gguf(options: argparse.Namespace) -> None:
    path = export_gguf(
        options.adapter_path, options.save_path, options.model, options.fused, options.outtype
    )
    use = f"-m {path}" if options.fused else f"-m MODEL.gguf --lora {path}"
    print(
        f"{'model' if options.fused else 'adapter'} in {path} (peak memory {size(peak_memory())})"
    )
    print(f'\nTry it with llama.cpp:\n  llama-cli {use} -p "..."')


def _ollama(options: argparse.Namespace) -> None:
    path = export_ollama(
        options.adapter_path,
        options.save_path,
        options.model,
        options.base_model,
        options.outtype,
    )
    print(f"Modelfile in {path.parent} (peak memory {size(peak_memory())})")
    print(f"\nTry it:\n  ollama create my-model -f {path}\n  ollama run my-model")


if __name__ == "__main__":
    sys.exit(main())
