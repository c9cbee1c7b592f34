"""The options that are mappings: LoRA parameters, schedule, optimizer arguments, Hub data sets."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import mlx.optimizers as optimizers

from mlx_edgelora.config.kinds import (
    FLAG,
    MAPPING,
    NUMBERS,
    TEXTS,
    Kind,
    check_options,
    integer,
    number,
    one_of,
    option,
    option_metadata,
    read_options,
    read_value,
    text,
    unknown_key,
)
from mlx_edgelora.errors import EdgeLoraError, shown

OPTIMIZERS = {
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "muon": optimizers.Muon,
    "sgd": optimizers.SGD,
    "adafactor": optimizers.Adafactor,
}

_SCHEDULES = [
    name
    for name, value in vars(optimizers.schedulers).items()
    if inspect.isfunction(value)
    and value.__module__ == optimizers.schedulers.__name__
    and not name.startswith("_")
]


@dataclass(frozen=True)
class LoraParameters:
    """The linear layers that get adapters, and the settings of the adapters.

    `use_rslora` is applied on creation: `scale` is multiplied by sqrt(rank), and the option is None
    again, so that an adapter's configuration has the scale that mlx-lm applies.
    """

    HINTS: ClassVar[dict[str, str]] = {
        "alpha": "use scale, the factor itself, which is alpha / rank"
    }

    rank: int = option(8, "Rank of the adapters.", integer(1, 2**16))
    dropout: float = option(
        0.0,
        "Probability with which an input of an adapter is dropped.",
        number("a number from 0 to less than 1", lambda value: 0 <= value < 1),
    )
    scale: float = option(
        20.0,
        "Factor that multiplies the output of an adapter.",
        number("a number other than 0", lambda value: value != 0),
    )
    keys: tuple[str, ...] | None = option(
        None,
        "Names of the layers to adapt, as in a block. Default: all linear layers.",
        TEXTS,
    )

    use_rslora: bool | None = option(
        None,
        "Rank-stabilized LoRA: multiply the scale by the square root of the rank.",
        FLAG,
    )

    def __post_init__(self) -> None:
        check_options(self, "lora_parameters.")
        if self.use_rslora:
            object.__setattr__(self, "scale", self.scale * math.sqrt(self.rank))
        object.__setattr__(self, "use_rslora", None)


@dataclass(frozen=True)
class _LrSchedule:
    """The keys of `lr_schedule`."""

    name: str = field(
        metadata=option_metadata("a function of mlx.optimizers.schedulers", one_of(*_SCHEDULES))
    )
    arguments: list = field(
        metadata=option_metadata("a list of numbers for that function", NUMBERS)
    )
    warmup: int = option(0, "Number of warm-up updates before the schedule.", integer(0))
    warmup_init: float = option(
        0.0,
        "Learning rate at the start of the warm-up.",
        number("a number of at least 0", lambda value: value >= 0),
    )


@dataclass(frozen=True)
class HubDataset:
    """One entry of `hf_dataset`; each `*_feature` defaults to the option of the same name."""

    path: str = field(
        metadata=option_metadata("the name of a data set on the Hugging Face Hub", text())
    )
    config: dict[str, Any] = field(
        default_factory=dict,
        metadata=option_metadata("Arguments for `datasets.load_dataset`.", MAPPING),
    )
    train_split: str = option("train[:80%]", "Rows to train on.", text())
    valid_split: str = option("train[-10%:]", "Rows to validate on.", text())
    test_split: str | None = option(None, "Rows to test on.", text())
    prompt_feature: str | None = option(None, "Key of the prompt.", text())
    completion_feature: str | None = option(None, "Key of the completion.", text())
    text_feature: str | None = option(None, "Key of the text.", text())
    chat_feature: str | None = option(None, "Key of the messages.", text())

    def __post_init__(self) -> None:
        check_options(self, "hf_dataset.")


def _read_lora(value: Any) -> LoraParameters:
    if isinstance(value, LoraParameters):
        return value
    return LoraParameters(**read_options(LoraParameters, value, "lora_parameters."))


def _read_schedule(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(_LrSchedule(**read_options(_LrSchedule, value, "lr_schedule.")))


def _read_hub(value: Any) -> tuple[HubDataset, ...]:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError
    return tuple(
        entry
        if isinstance(entry, HubDataset)
        else HubDataset(**read_options(HubDataset, entry, "hf_dataset."))
        for entry in entries
    )


def _read_optimizer_config(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise ValueError
    for name, arguments in value.items():
        place = f"optimizer_config.{name}"
        if name not in OPTIMIZERS:
            raise unknown_key(place, name, list(OPTIMIZERS))
        if not isinstance(arguments, Mapping | None):
            raise EdgeLoraError(f"{place}: got {shown(arguments)}, expected {MAPPING.expected}")
        known = dict(inspect.signature(OPTIMIZERS[name]).parameters)
        known.pop("learning_rate")
        for key, argument in (arguments or {}).items():
            if key not in known:
                raise unknown_key(f"{place}.{key}", key, list(known))
            if argument is not None:
                read_value(f"{place}.{key}", argument, _kind_of(known[key].default))
    return {name: dict(value.get(name) or {}) for name in OPTIMIZERS}


def _kind_of(default: Any) -> Kind:
    """The kind of an optimizer's argument, by its default."""
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, int):  # muon's ns_steps, each of which is part of one graph
        return integer(0, 100)
    if isinstance(default, list | tuple):
        return dataclasses.replace(
            NUMBERS, read=partial(_read_as_many, len(default)), expected=f"{len(default)} numbers"
        )
    return number("a number")


def _read_as_many(count: int, value: Any) -> list[float]:
    numbers = NUMBERS.read(value)
    if len(numbers) != count:
        raise ValueError
    return numbers


LORA = Kind("a mapping with rank, dropout, scale, keys and use_rslora", _read_lora, None)
SCHEDULE = Kind("a mapping with name, arguments, warmup and warmup_init", _read_schedule, None)
HUB = Kind("a mapping with path, or a list of them", _read_hub, None)
OPTIMIZER_CONFIG = Kind("a mapping of optimizers to arguments", _read_optimizer_config, None)
