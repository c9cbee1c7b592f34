"""Read a YAML configuration file."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mlx_edgelora.errors import EdgeLoraError, shown

# Limits of a file, in bytes and in values with every alias written out. A few lines of aliases of
# aliases stand for billions of values, which take no memory before something visits them.
MOST_BYTES, MOST_VALUES = 200_000, 100_000
# Limit of brackets in brackets. The time that PyYAML takes grows with its square.
MOST_DEPTH = 50
# What PyYAML raises for a value that is not of its tag, such as `!!bool x`, `0x_` or 2001-13-45.
_VALUE_ERRORS = (ValueError, ArithmeticError, AttributeError, LookupError, TypeError)


class _Loader(yaml.SafeLoader):
    """A loader that reads YAML as mlx-lm does (`1e-5` is a number) and rejects repeated keys.

    mlx-lm changes `yaml.SafeLoader` itself. A subclass does not affect other users of that class.
    """

    def fetch_more_tokens(self) -> None:
        if self.flow_level > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_more_tokens()

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _VALUE_ERRORS as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value)} is no {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} occurs twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node with every alias written out; `known` has counts by node.

    Raises:
        MarkedYAMLError: there are too many, or a value is part of itself.
    """
    if id(node) in known:
        count = known[id(node)]
    else:
        known[id(node)] = 0
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        count = known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    if not 0 < count <= MOST_VALUES:
        problem = "a value is part of itself" if not count else f"more than {MOST_VALUES} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return count


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML or JSON file; empty for an empty file.

    Raises:
        EdgeLoraError: the file cannot be read, is not YAML or is not a mapping; it is larger than
            200 kB, or aliases make it larger than 100,000 values.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise EdgeLoraError(
                f"{path}: is larger than {MOST_BYTES // 1000} kB, expected a configuration file"
            )
        content = yaml.load(content.decode(), _Loader)
    except OSError as error:
        raise EdgeLoraError(
            f"{path}: cannot be read ({error.strerror}), expected a YAML configuration file"
        ) from error
    except UnicodeDecodeError as error:
        raise EdgeLoraError(f"{path}: is not UTF-8 text, expected a YAML file") from error
    except RecursionError as error:
        raise EdgeLoraError(f"{path}: is nested too deeply, expected options") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise EdgeLoraError(f"{place}: is not valid YAML: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise EdgeLoraError(
            f"{path}: got {type(content).__name__}, expected `key: value` lines of options"
        )
    return content
