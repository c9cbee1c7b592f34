"""Kinds of options, which check and convert the values of an option.

An option is a dataclass field with metadata from `option_metadata`. Its kind defines its type, its
range and how its text on a command line is read.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from mlx_edgelora.errors import EdgeLoraError, shortened, shown

# MLX counts elements of a dimension in 32 bits and bytes in 64, and computes in float32.
MOST_COUNT, MOST_BYTES = 2**31 - 1, 2**60
LEAST_NUMBER, MOST_NUMBER = 1e-37, 1e38


@dataclass(frozen=True)
class Kind:
    """The values that an option accepts.

    Attributes:
        expected: text after "expected" in error messages.
        read: value from YAML or Python -> value of the option; raises ValueError.
        parse: text on a command line -> argument of `read`; raises ValueError. `bool` stands for a
            pair of flags, None for an option that only a config file can set.
        choices: all accepted values, if they are few; for help texts.
    """

    expected: str
    read: Callable[[Any], Any]
    parse: Callable[[str], Any] | None = str
    choices: tuple[Any, ...] = ()


def option_metadata(text: str, kind: Kind) -> dict[str, Any]:
    """The metadata of a dataclass field that is an option."""
    return {"help": text, "kind": kind}


def option(default: Any, text: str, kind: Kind) -> Any:
    """A dataclass field that is an option with an immutable default."""
    return dataclasses.field(default=default, metadata=option_metadata(text, kind))


class _OutOfRangeError(ValueError):
    """A value of the right type that MLX cannot use; the text goes after what was expected."""


def integer(minimum: int, maximum: int | None = None, also: int | None = None) -> Kind:
    """A whole number from `minimum` up to `maximum`, or the value `also`.

    The default of `maximum` is 2^31 - 1.
    """

    def read(value: Any) -> int:
        _require(isinstance(value, int) and not isinstance(value, bool))
        _require(value == also or minimum <= value <= (value if maximum is None else maximum))
        if maximum is None and value > MOST_COUNT:
            raise _OutOfRangeError(f"and at most {MOST_COUNT}")
        return value

    expected = f"a whole number of at least {minimum}"
    if maximum is not None:
        expected = f"a whole number from {minimum} to {maximum}"
    if also is not None:
        expected = f"{also} or {expected}"
    return Kind(expected, read, int)


def number(expected: str, test: Callable[[float], bool] = lambda value: True) -> Kind:
    """A finite number that passes the test; whole numbers are accepted.

    A number other than 0 must be one of float32, where it would become 0 or infinity.
    """

    def read(value: Any) -> float:
        _require(isinstance(value, int | float) and not isinstance(value, bool))
        _require(math.isfinite(value) and test(value))
        if value and not LEAST_NUMBER <= abs(value) <= MOST_NUMBER:
            raise _OutOfRangeError(f"from {LEAST_NUMBER:g} to {MOST_NUMBER:g}")
        return float(value)

    return Kind(expected, read, float)


def text(expected: str = "text", test: Callable[[str], bool] = lambda value: True) -> Kind:
    """A string, or a path, that passes the test."""

    def read(value: Any) -> str:
        value = _read_text(value)
        _require(test(value))
        return value

    return Kind(expected, read)


def _read_text(value: Any) -> str:
    _require(isinstance(value, str | os.PathLike))
    value = os.fspath(value)
    _require(isinstance(value, str) and "\0" not in value)  # no system call accepts it
    value.encode()  # a name that is not UTF-8 cannot be given to MLX, or written as JSON
    return value


def expand_home(value: Any) -> str:
    """A path with `~` replaced, which a shell leaves in `--log=~/file` and YAML everywhere.

    Raises:
        ValueError: it is not a path of UTF-8 text, or `~name` names nobody.
    """
    value = os.path.expanduser(_read_text(value))
    _require(not value.startswith("~"))
    return value


_PATH = "a path in UTF-8, where ~ is the home folder"
PATH = Kind(f"text: {_PATH}", expand_home)
FULL_PATH = Kind(f"text that is not empty: {_PATH}", lambda value: expand_home(value) or _fail())


def path_argument(value: str) -> str:
    """The type of a path for argparse; see `expand_home`."""
    try:
        return expand_home(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {shown(value)}, expected {_PATH}") from None


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the option `--model` of a command that works with an adapter."""
    parser.add_argument(
        "--model",
        type=path_argument,
        metavar="MODEL",
        help="Model folder or Hugging Face name. Default: the model the adapter was trained on.",
    )


def _fail() -> NoReturn:
    raise ValueError


def one_of(*choices: Any) -> Kind:
    """One of several strings, in upper or lower case, or one of several whole numbers."""

    def read(value: Any) -> Any:
        value = value.lower() if isinstance(value, str) else value
        _require(not isinstance(value, bool) and value in choices)
        return value

    expected = f"one of {', '.join(map(str, choices))}"
    return Kind(expected, read, type(choices[0]), choices)


def _read_flag(value: Any) -> bool:
    _require(isinstance(value, bool))
    return value


def _read_texts(value: Any) -> tuple[str, ...]:
    _require(isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0)
    _require(all(isinstance(item, str) for item in value))
    return tuple(value)


def _read_numbers(value: Any) -> list[float]:
    _require(isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0)
    _require(all(isinstance(n, int | float) and not isinstance(n, bool) for n in value))
    _require(all(number == 0 or LEAST_NUMBER <= abs(number) <= MOST_NUMBER for number in value))
    return list(value)


def _read_mapping(value: Any) -> dict[str, Any]:
    _require(isinstance(value, Mapping) and all(isinstance(key, str) for key in value))
    return dict(value)


# Up to this many known keys are listed if none is similar to an unknown key.
FEW = 12

_UNITS = {"": 1, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}


def _read_size(value: Any) -> int:
    """Bytes from a text such as `4GB`, `1.5 G` or `500M`; decimal units, as in mlx-lm."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", value)
        _require(match is not None and match[2].upper() in _UNITS)
        value = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    _require(isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    if value > MOST_BYTES:
        raise _OutOfRangeError(f"and at most {MOST_BYTES} bytes")
    return value


def _read_budget(value: Any) -> int | str:
    if isinstance(value, str) and value.strip().lower() == "min":
        return "min"
    size = _read_size(value)
    _require(size >= _UNITS["MB"])
    return size


def _read_switch(value: Any) -> str:
    """Read `on` or `off`, which YAML gives as true and false."""
    if isinstance(value, bool):
        return "on" if value else "off"
    _require(isinstance(value, str) and value.lower() in ("on", "off"))
    return value.lower()


def _read_resume(value: Any) -> bool | str:
    _require(isinstance(value, bool | str | os.PathLike))
    return value if isinstance(value, bool) else expand_home(value)


def _read_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [name.strip().lstrip("-").replace("-", "_") for name in value.split(",")]
    _require(isinstance(value, Sequence) and len(value) > 0)
    _require(all(isinstance(name, str) and name for name in value))
    return tuple(value)


_SECONDS = {"h": 3600, "m": 60, "s": 1}


def _read_duration(value: Any) -> float:
    """Seconds from a text such as `2h`, `1h30m` or `90s`, or from a number."""
    if isinstance(value, str) and (parts := re.findall(r"([\d.]+)\s*([hms])\s*", value)):
        _require(re.fullmatch(r"\s*([\d.]+\s*[hms]\s*)+", value) is not None)
        return _read_duration(sum(float(count) * _SECONDS[unit] for count, unit in parts))
    value = float(value) if isinstance(value, str) else value
    _require(isinstance(value, int | float) and not isinstance(value, bool))
    _require(math.isfinite(value) and value > 0)
    return float(value)


PROMPTS = Kind("prompts, or files of prompts", _read_texts, tuple)
FLAG = Kind("true or false", _read_flag, bool)
SWITCH = Kind("on or off", _read_switch, str, ("on", "off"))
TEXTS = Kind("a list of at least one text", _read_texts, None)
NUMBERS = Kind("a list of at least one number", _read_numbers, None)
MAPPING = Kind("a mapping of names to values", _read_mapping, None)
BUDGET = Kind("min, or a size such as 800MB or 4GB (at least 1MB)", _read_budget)
RESUME = Kind("nothing, or the folder of a run or of one of its checkpoints", _read_resume)
NAMES = Kind("names with a comma between them", _read_names)
DURATION = Kind("a time above 0 such as 90s, 45m, 2h or 1h30m", _read_duration)
SIZE = Kind("bytes, as a whole number of at least 0 or a text such as 500MB or 4GB", _read_size)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def read_value(name: str, value: Any, kind: Kind) -> Any:
    """Read the value of an option.

    Raises:
        EdgeLoraError: the value is invalid; the message names the option, the value and what was
            expected.
    """
    try:
        return kind.read(value)
    except _OutOfRangeError as error:
        expected = f"{kind.expected}, {error}"
    except (ValueError, ArithmeticError):  # OverflowError and those of Decimal
        expected = kind.expected
    raise EdgeLoraError(f"{name}: got {shown(value)}, expected {expected}")


def unknown_key(name: str, key: Any, known: Sequence[str]) -> EdgeLoraError:
    """The error for a key that is not in `known`; the message calls the key `name`."""
    name = shortened(name, 200)
    if near := difflib.get_close_matches(str(key)[:100], known, n=1):
        return EdgeLoraError(
            f"{name}: unknown key, the nearest known one is {near[0]}; correct its spelling or "
            "take it out"
        )
    names = f"expected one of {', '.join(known)}" if len(known) <= FEW else "--help lists all"
    return EdgeLoraError(f"{name}: unknown key, {names}; correct it or take it out")


def read_options(cls: type, mapping: Any, prefix: str = "") -> dict[str, Any]:
    """Read the options of a dataclass from a mapping.

    A null value leaves the option at its default, as in mlx-lm.

    Args:
        cls: a dataclass of options. Its class attribute `HINTS`, if any, maps keys of other
            tools to hints for the error message.
        mapping: values by key, as read from YAML.
        prefix: prefix of the names in error messages.

    Raises:
        EdgeLoraError: an unknown or missing key, or an invalid value.
    """
    if not isinstance(mapping, Mapping):
        place = prefix.rstrip(".") or "the configuration"
        raise EdgeLoraError(f"{place}: got {shown(mapping)}, expected {MAPPING.expected}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key in getattr(cls, "HINTS", {}):
            raise EdgeLoraError(f"{prefix}{key}: unknown key; {cls.HINTS[key]}")
        if key not in fields:
            raise unknown_key(f"{prefix}{key}", key, list(fields))
    values = {key: value for key, value in mapping.items() if value is not None}
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise EdgeLoraError(f"{prefix}{name}: missing, expected {field.metadata['help']}")
    return {
        key: read_value(f"{prefix}{key}", value, fields[key].metadata["kind"])
        for key, value in values.items()
    }


def check_options(options: Any, prefix: str = "") -> None:
    """Check and convert each field of a frozen dataclass of options, in place."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None and field.default is None:
            continue
        value = read_value(f"{prefix}{field.name}", value, field.metadata["kind"])
        object.__setattr__(options, field.name, value)
