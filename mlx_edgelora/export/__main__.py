"""`python -m mlx_edgelora.export`: write an adapter in the format of another program."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_edgelora.command import command
from mlx_edgelora.config.kinds import add_model, path_argument
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.gguf_files import OUTTYPES, export_gguf
from mlx_edgelora.export.hub import Publisher, model_card, public_name
from mlx_edgelora.export.ollama import export_ollama
from mlx_edgelora.export.peft import export_peft
from mlx_edgelora.measure.meter import peak_memory
from mlx_edgelora.measure.units import size
from mlx_edgelora.training.adapters import base_model
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
    publisher = None
    if options.push_to_hub is not None:
        publisher = Publisher(options.push_to_hub)
        _check_base(options)
    with explain_failures(f"{options.save_path} was not written"):
        {"peft": _peft, "gguf": _gguf, "ollama": _ollama}[options.format](options)
    if publisher is not None:
        base = options.model if options.format == "ollama" else options.base_model or options.model
        card = model_card(options.adapter_path, options.format, base, options.push_to_hub)
        print(f"\npublished: {publisher.push(Path(options.save_path), card)}")
    return 0


def _check_base(options: argparse.Namespace) -> None:
    """A published PEFT adapter must name a model that others can find."""
    base = options.base_model or options.model or base_model(Path(options.adapter_path))
    if options.format == "peft" and public_name(base) is None:
        raise EdgeLoraError(
            f"--push-to-hub: the base model {base} is a folder of this machine, expected a name "
            "that others can load; give one with --base-model"
        )


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
    add_model(parser)
    add(
        "--adapter-path",
        type=path_argument,
        default="adapters",
        metavar="FOLDER",
        help="Folder of an adapter. Default: adapters.",
    )
    add(
        "--save-path",
        type=path_argument,
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
    add(
        "--push-to-hub",
        metavar="REPO",
        help="Upload the folder to the Hugging Face Hub, with a model card and your own token; a "
        "new repository is private. Default: nothing is uploaded.",
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
