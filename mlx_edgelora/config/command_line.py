"""The command line, made from the fields of `TrainConfig`."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mlx_edgelora.config.kinds import read_value, unknown_key
from mlx_edgelora.config.train_config import TrainConfig
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.errors import EdgeLoraError


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise EdgeLoraError(f"command line: {message}; --help lists the options")


def build_parser() -> argparse.ArgumentParser:
    """A parser with a flag for every option that is one value, named as in mlx-lm."""
    parser = _Parser(
        prog="python -m mlx_edgelora.train",
        description="Fine-tune a language model with LoRA in little memory.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(TrainConfig):
        kind, text = field.metadata["kind"], field.metadata["help"]
        flags = [_flag(field)]
        if field.name == "config":
            flags.insert(0, "-c")
        if _takes_file_only(field):
            continue
        if kind.parse is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
            continue
        if field.default is not None:
            text += f" (default: {field.default})"
        metavar = "|".join(map(str, kind.choices)) or kind.parse.__name__.upper()
        parser.add_argument(*flags, metavar=metavar, help=text)
    return parser


def config_from_cli(argv: Sequence[str], preset: Mapping[str, Any] | None = None) -> TrainConfig:
    """The run that a command line describes; it wins over its `--config` file.

    Args:
        argv: the arguments, without the name of the command.
        preset: options below those of the command line, used only when it names no model, no
            data and no file.

    Raises:
        EdgeLoraError: an unknown flag or key, or a value that is not accepted.
    """
    parsed = _parse(argv)
    layers = []
    if "config" in parsed:
        layers.append((read_yaml(parsed["config"]), parsed["config"]))
    elif preset is not None and not parsed.keys() & {"model", "data"}:
        layers.append((preset, "preset"))
    return TrainConfig.from_layers(*layers, (parsed, None))


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _refuse(argument: str) -> NoReturn:
    if not argument.startswith("-"):
        raise EdgeLoraError(f"command line: got {argument!r}, expected a flag such as --model")
    argument = argument.partition("=")[0]
    in_file = [field for field in dataclasses.fields(TrainConfig) if _takes_file_only(field)]
    if argument in map(_flag, in_file):
        raise EdgeLoraError(f"command line: {argument} is not a flag; write it in a --config file")
    flags = [_flag(field) for field in dataclasses.fields(TrainConfig) if field not in in_file]
    raise unknown_key(f"command line: {argument}", argument, flags)


def _takes_file_only(field: dataclasses.Field) -> bool:
    return field.metadata["kind"].parse is None


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """The values given on the command line, as their kinds read them."""
    known, rest = build_parser().parse_known_args(list(argv))
    if rest:
        _refuse(rest[0])
    values = {}
    for field in dataclasses.fields(TrainConfig):
        if field.name not in known:
            continue
        value, kind = getattr(known, field.name), field.metadata["kind"]
        name = _flag(field)
        try:
            value = value if kind.parse is bool else kind.parse(value)
        except ValueError:
            raise EdgeLoraError(f"{name}: got {value!r}, expected {kind.expected}") from None
        values[field.name] = read_value(name, value, kind)
    return values
