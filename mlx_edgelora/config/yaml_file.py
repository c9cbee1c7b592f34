"""Read a YAML configuration file."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mlx_edgelora.errors import EdgeLoraError


class _Loader(yaml.SafeLoader):
    """A loader that reads YAML as mlx-lm does (`1e-5` is a number) and rejects repeated keys.

    mlx-lm changes `yaml.SafeLoader` itself. A subclass does not affect other users of that class.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML or JSON file; empty for an empty file.

    Raises:
        EdgeLoraError: the file cannot be read, is not YAML or is not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text("utf-8"), _Loader)
    except OSError as error:
        raise EdgeLoraError(
            f"{path}: cannot be read ({error.strerror}), expected a YAML configuration file"
        ) from error
    except UnicodeDecodeError as error:
        raise EdgeLoraError(f"{path}: is not UTF-8 text, expected a YAML file") from error
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
