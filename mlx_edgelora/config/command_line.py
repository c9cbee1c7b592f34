"""The command line, built from the fields of `TrainConfig`."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlx_edgelora.config.hints import HINTS
from mlx_edgelora.config.kinds import read_value, unknown_key
from mlx_edgelora.config.train_config import TrainConfig
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.errors import EdgeLoraError, shown


class _Parser(argparse.ArgumentParser):
    """A parser that raises an error instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise EdgeLoraError(f"command line: {message}; --help lists the options")


# The groups of --help. Each option has a placeholder for its value; None for flags and choices.
GROUPS: dict[str, dict[str, str | None]] = {
    "model and data": {
        "config": "FILE",
        "model": "MODEL",
        "data": "DATA",
        "data_format": None,
        "val_split": "SHARE",
        "system_prompt": "TEXT",
        "mask_prompt": None,
        "train_on": None,
        "allow_lost_content": None,
        "max_seq_length": "TOKENS",
        "packing": None,
        "prompt_feature": "NAME",
        "completion_feature": "NAME",
        "text_feature": "NAME",
        "chat_feature": "NAME",
        "quantize": None,
    },
    "LoRA": {
        "num_layers": "N",
        "lora_preset": None,
        "adapter_path": "FOLDER",
        "resume_adapter_file": "FILE",
        "fine_tune_type": None,
    },
    "interrupted runs": {
        "resume": "FOLDER",
        "accept_changes": "NAMES",
        "overwrite": None,
        "keep_checkpoints": "N",
        "max_time": "TIME",
    },
    "optimization": {
        "iters": "N",
        "epochs": "N",
        "batch_size": "N",
        "grad_accumulation_steps": "N",
        "learning_rate": "RATE",
        "loraplus_lr_ratio": "RATIO",
        "optimizer": None,
        "max_grad_norm": "NORM",
        "loss": None,
        "loss_k": "N",
        "loss_max_subset": "N",
        "loss_tail_correction": None,
        "label_smoothing": "SHARE",
        "beta": "BETA",
        "simpo_gamma": "GAMMA",
        "desirable_weight": "WEIGHT",
        "undesirable_weight": "WEIGHT",
        "seed": "N",
    },
    "evaluation": {
        "train": None,
        "test": None,
        "val_batches": "N",
        "test_batches": "N",
        "steps_per_eval": "N",
        "sample_every": "N",
        "sample_prompts": "PROMPT",
        "sample_tokens": "N",
    },
    "memory": {
        "memory_budget": "SIZE",
        "dtype": None,
        "weights": None,
        "activations": None,
        "adapters": None,
        "spill_dir": "FOLDER",
        "plan": "FILE",
        "plan_out": "FILE",
        "memory_profile": "FOLDER",
    },
    "output": {
        "steps_per_report": "N",
        "save_every": "N",
        "save_best": None,
        "log": "FILE",
        "report": "FILE",
        "report_to": "NAMES",
        "project_name": "NAME",
        "verbose": None,
    },
    "advanced": {
        "kernel": None,
        "verify": None,
        "duty": "SHARE",
        "balance": None,
        "caffeinate": None,
        "cache_dir": "FOLDER",
        "clear_cache_threshold": "SIZE",
        "grad_checkpoint": None,
        "trust_remote_code": None,
    },
}
# The last line of --help.
IN_FILE = "Only in a config file: lora_parameters, optimizer_config, lr_schedule, hf_dataset."


def build_parser() -> argparse.ArgumentParser:
    """Build a parser with a flag for each option that is a single value, named as in mlx-lm."""
    parser = _Parser(
        prog="mlx-edgelora train",
        usage="%(prog)s [options]",
        description="Fine-tune a language model with LoRA within a memory budget. Without options "
        "it trains a tiny model that comes with the package.",
        epilog=IN_FILE,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    options = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, metavar in names.items():
            _add(group, options[name], metavar)
    return parser


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field, metavar: str | None) -> None:
    kind, text, flags = field.metadata["kind"], field.metadata["help"], [_flag(field)]
    if field.name == "config":
        flags.insert(0, "-c")
    if kind.parse is bool:
        if field.default is not None:
            text = f"{text} Default: {'yes' if field.default else 'no'}."
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=_escaped(text))
        return
    if field.default is not None:
        text = f"{text} Default: {field.default}."
    # --resume may have no value.
    optional = {"nargs": "?", "const": True} if field.name == "resume" else {}
    if field.name == "sample_prompts":
        optional = {"nargs": "+"}
    metavar = metavar or "|".join(map(str, kind.choices))
    group.add_argument(*flags, metavar=metavar, help=_escaped(text), **optional)


def _escaped(text: str) -> str:
    """Escape a help text, which argparse formats with %."""
    return text.replace("%", "%%")


def config_from_cli(
    argv: Sequence[str],
    preset: Mapping[str, Any] | None = None,
    saved: Callable[[Path], Mapping[str, Any]] | None = None,
) -> TrainConfig:
    """Build a configuration from the command line, which takes precedence over a `--config` file.

    Args:
        argv: the arguments, without the name of the command.
        preset: defaults that are used if the command line has no model, no data and no config file.
        saved: returns the options of the run in a folder. They are the defaults with `--resume`.

    Raises:
        EdgeLoraError: an unknown flag or key, or an invalid value.
    """
    parsed = _parse(argv)
    layers = []
    if "config" in parsed:
        layers.append((read_yaml(parsed["config"]), parsed["config"]))
    if parsed.get("resume") and "resume_adapter_file" in parsed:
        raise EdgeLoraError(
            "command line: got --resume and --resume-adapter-file, expected one of them: the "
            "first goes on with a run, the second starts one from an adapter"
        )
    merged = {key: value for layer, _ in layers for key, value in layer.items()} | parsed
    if saved is not None and (place := merged.get("resume")):
        if place is True:
            place = merged.get("adapter_path") or TrainConfig.adapter_path
        layers.insert(0, (saved(Path(place)), f"{place}"))
    elif preset is not None and not parsed.keys() & {"model", "data", "config"}:
        layers.append((preset, "preset"))
    return TrainConfig.from_layers(*layers, (parsed, None))


def _flag(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _refuse(argument: str) -> NoReturn:
    if not argument.startswith("-"):
        raise EdgeLoraError(f"command line: got {shown(argument)}, expected a flag such as --model")
    argument = argument.partition("=")[0]
    in_file = [field for field in dataclasses.fields(TrainConfig) if _takes_file_only(field)]
    if argument in map(_flag, in_file):
        raise EdgeLoraError(f"command line: {argument} is not a flag; write it in a --config file")
    hint = HINTS.get(argument.lstrip("-").replace("-", "_"))
    if hint is not None:
        raise EdgeLoraError(f"command line: {argument}: unknown key; {hint}")
    flags = [_flag(field) for field in dataclasses.fields(TrainConfig) if field not in in_file]
    raise unknown_key(f"command line: {argument}", argument, flags)


def _takes_file_only(field: dataclasses.Field) -> bool:
    return field.metadata["kind"].parse is None


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """The values on the command line, read by the kinds of their options."""
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
            value = value if isinstance(value, bool) else kind.parse(value)
        except (ValueError, OverflowError):
            got = f"{name}: got {shown(value)}"
            raise EdgeLoraError(f"{got}, expected {kind.expected}") from None
        values[field.name] = read_value(name, value, kind)
    return values
