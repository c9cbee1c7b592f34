"""Read the folder of a Hugging Face PEFT adapter: its configuration and pairs of matrices."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.export.peft import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from mlx_edgelora.model.checkpoint import error_text
from mlx_edgelora.storage.safetensors import read_header, verify_checksum

# Settings of PEFT that mlx-lm has nothing for, with the values that do nothing.
_WITHOUT_EFFECT = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    # The others change the base model's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_LEAF = re.compile(
    r"(?P<place>.+)\.(?:lora_(?P<pair>[AB])\.weight|lora_embedding_(?P<rows>[AB])"
    r"|(?P<m>lora_magnitude_vector)(?:\.weight)?)"
)
# PEFT saves the base model's own matrices as well when an adapter of one of them is saved.
_COPY = re.compile(r"(model\.embed_tokens|lm_head)(?:\.base_layer)?\.weight")


@dataclass
class Pair:
    """A pair of matrices in PEFT's layout, and what their product is multiplied by.

    Attributes:
        a: [rank, in], or [experts x rank, in].
        b: [out, rank], or [out, rank x experts].
        m: DoRA's magnitudes [out].
        rank: rank of one matrix.
        scale: factor of the product.
    """

    a: mx.array
    b: mx.array
    m: mx.array | None
    rank: int
    scale: float


@dataclass
class PeftFolder:
    """A PEFT adapter whose tensors have not been read.

    Attributes:
        path: the folder.
        config: its `adapter_config.json`.
        tensors: arrays by place and by A, B or m.
        copies: copies of the base model's embedding and head.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, dict[str, mx.array]]
    copies: dict[str, mx.array]

    def pair(self, place: str, parameter: str, count: int = 1) -> Pair:
        """The matrices of a place.

        Args:
            place: name of the module in the file.
            parameter: the name that PEFT looks for in `rank_pattern` and `alpha_pattern`.
            count: number of experts.

        Raises:
            EdgeLoraError: one is missing, or its rank is not that of the configuration.
        """
        found = self.tensors[place]
        if missing := [leaf for leaf in "AB" if leaf not in found]:
            raise EdgeLoraError(
                f"{self.path / PEFT_WEIGHTS}: has no lora_{missing[0]} for {place}, expected lora_A"
                " and lora_B; write the adapter again"
            )
        rank = self._setting("r", "rank_pattern", parameter)
        alpha = self._setting("lora_alpha", "alpha_pattern", parameter)
        shapes = found["A"].shape, found["B"].shape
        if any(len(shape) != 2 for shape in shapes) or (shapes[0][0], shapes[1][1]) != (
            count * rank,
            count * rank,
        ):
            raise EdgeLoraError(
                f"{self.path / PEFT_WEIGHTS}: lora_A and lora_B of {place} have shapes "
                f"{shapes[0]} and {shapes[1]}, expected the rank {count * rank} of {PEFT_CONFIG}; "
                "put back the files that belong together"
            )
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return Pair(found["A"], found["B"], found.get("m"), rank, alpha / root)

    def _setting(self, name: str, patterns: str, place: str) -> Any:
        for key, value in (self.config.get(patterns) or {}).items():
            plain = self._plain(patterns, key)
            if place == plain or place.endswith(f".{plain}"):
                return self._number(patterns, value)
        return self._number(name, self.config.get(name))

    def _plain(self, patterns: str, key: str) -> str:
        """The name that a pattern is the end of; general regular expressions are refused."""
        plain = re.sub(r"^\^?(\.\*\\?\.)?", "", key).removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise EdgeLoraError(
                f"{self.path / PEFT_CONFIG}: {patterns} has {key!r}, expected names of modules; "
                "write them out"
            )
        return plain

    def _number(self, name: str, value: object) -> float | int:
        whole = name in ("r", "rank_pattern")
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else int | float)
            or not math.isfinite(value)
            or (whole and value < 1)
        ):
            raise EdgeLoraError(
                f"{self.path / PEFT_CONFIG}: {name} is {value!r}, expected a number above 0; "
                "write the adapter again"
            )
        return value


def read_peft(path: Path) -> PeftFolder:
    """Read a PEFT adapter's configuration and the header of its tensors.

    Raises:
        EdgeLoraError: a file is missing or damaged, or the adapter has what mlx-lm has no form for.
    """
    config = _read_config(path)
    file = path / PEFT_WEIGHTS
    if not file.exists() and (path / "adapter_model.bin").exists():
        raise EdgeLoraError(
            f"{path}: its weights are a pickle (adapter_model.bin), which could run code and is "
            f"never read, expected {PEFT_WEIGHTS}; save the adapter again with a recent PEFT"
        )
    header = read_header(file)
    verify_checksum(file)
    arrays = mx.load(str(file))
    tensors: dict[str, dict[str, mx.array]] = {}
    copies: dict[str, mx.array] = {}
    for name in header:
        if copy := _COPY.fullmatch(name.removeprefix(PREFIX)):
            copies[copy[1]] = arrays[name]
            continue
        match = _LEAF.fullmatch(name.removeprefix(PREFIX))
        if match is None or not name.startswith(PREFIX):
            raise EdgeLoraError(
                f"{file}: has the tensor {name!r}, expected only lora_A, lora_B and "
                f"lora_magnitude_vector of names that begin with {PREFIX}; mlx-lm has no form for "
                "others"
            )
        leaf = "m" if match["m"] else match["pair"] or match["rows"]
        tensors.setdefault(match["place"], {})[leaf] = arrays[name]
    if not tensors:
        raise EdgeLoraError(f"{file}: has no tensors, expected those of an adapter")
    return PeftFolder(path, config, tensors, copies)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / PEFT_CONFIG
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EdgeLoraError(
            f"{path}: is not the folder of a PEFT adapter ({error_text(error)}), expected "
            f"{PEFT_CONFIG} and {PEFT_WEIGHTS}; save_pretrained of a PEFT model makes one"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        hint = "; it is an adapter of mlx-lm already" if _is_mlx(config) else ""
        raise EdgeLoraError(f"{file}: peft_type is {got!r}, expected 'LORA'{hint}")
    for name, values in _WITHOUT_EFFECT.items():
        value = config.get(name)
        if name in config and value not in values:
            raise EdgeLoraError(
                f"{file}: {name} is {value!r}, which mlx-lm has no form for; merge the adapter "
                "with PEFT and convert the model instead"
            )
    return config


def _is_mlx(config: object) -> bool:
    return isinstance(config, dict) and "lora_parameters" in config


def expected_places(config: dict[str, Any], linear: Iterator[str]) -> list[str]:
    """The linear layers that a configuration asks to adapt, where it names them.

    Args:
        config: PEFT's configuration.
        linear: names in transformers of all linear layers of the model.
    """
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return []  # a regular expression, which the tensors answer better
    layers = [layers] if isinstance(layers, int) else layers
    result = []
    for name in linear:
        block = re.search(r"\.(\d+)\.", name)
        if layers and (block is None or int(block[1]) not in layers):
            continue
        if any(name == target or name.endswith(f".{target}") for target in targets):
            result.append(name)
    return result
