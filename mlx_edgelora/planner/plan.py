"""The plan of a run: what the engine keeps, spills, streams and computes in tiles."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mlx_edgelora.config.kinds import MOST_BYTES, MOST_COUNT
from mlx_edgelora.errors import EdgeLoraError, shown
from mlx_edgelora.measure.units import size

MIB = 2**20
# Version of the file of a plan. Raise it when the meaning of a field changes.
VERSION = 2


def _choice(default: Any, *values: Any, least: int | None = None) -> Any:
    """A field that is one of `values`, or a whole number of at least `least` if it is given."""
    return field(default=default, metadata={"values": values, "least": least})


@dataclass(frozen=True)
class Plan:
    """The choices of a run that trade memory for time.

    Attributes:
        streamed_blocks: number of first blocks whose frozen weights are read from disk each time
            the block is computed. The weights of the other blocks stay in memory. None streams all
            blocks.
        head: placement of the token embedding and the vocabulary head, "streamed" or "resident".
            They stay in memory if all blocks do.
        prefetch: whether to read the weights of the next streamed block while one is computed.
        kept_blocks: number of last blocks whose activations are kept instead of recomputed. If the
            head is in memory, these blocks and the loss form one graph.
        inputs: where the inputs of blocks are stored until the backward, "file" or "memory".
        adapters: placement of the adapters, their gradients and the optimizer state, "paged" or
            "resident".
        tile_tokens: number of tokens for which a block is computed at a time; None computes all at
            once. Excludes kept_blocks.
        mlp_bytes: bytes of a slice of a gated MLP, and of a group of experts; None computes MLPs
            layer by layer, and all experts at once.
        mlp_weights: "block" reads the matrices of a gated MLP with their block, "rows" reads them
            by rows, for every tile of tokens anew, so that no matrix is in memory whole. "rows"
            needs tile_tokens and mlp_bytes, and is for streamed blocks whose only gated MLP has
            no dropout.
        key_tokens: number of tokens whose sums of gradients of keys and values are in memory at a
            time, where blocks are computed by tiles and inputs are in a file; None for all.
        kernel: how packed matrices are multiplied. "fused" is MLX's own kernel. "dequantize"
            unpacks them one tile at a time, as slices of an MLP always do. "auto" depends on the
            backend.
        loss_bytes: bytes of a tile of the vocabulary head.
        attention_block: number of queries and keys whose scores MLX's gradient of attention on
            Metal computes at a time; None is MLX's default. Other backends have no such gradient.
        micro_batches: number of parts in which a batch is computed; their gradients are added.
        cache_bytes: least bytes of freed buffers that MLX may cache, enough to reuse those of one
            block. The cache may be larger if the budget leaves room (`RunPlan.cache_bytes`). MLX's
            default on Metal keeps nearly all freed buffers.
        reason: why this plan was chosen.

    Raises:
        EdgeLoraError: a field has an invalid value, or two fields exclude each other.
    """

    streamed_blocks: int | None = _choice(None, None, least=0)
    head: str = _choice("streamed", "streamed", "resident")
    prefetch: bool = _choice(True, True, False)
    kept_blocks: int = _choice(0, least=0)
    inputs: str = _choice("file", "file", "memory")
    adapters: str = _choice("resident", "resident", "paged")
    tile_tokens: int | None = _choice(None, None, least=1)
    mlp_bytes: int | None = _choice(None, None, least=1)
    mlp_weights: str = _choice("block", "block", "rows")
    key_tokens: int | None = _choice(None, None, least=1)
    kernel: str = _choice("auto", "auto", "fused", "dequantize")
    loss_bytes: int = _choice(40 * MIB, least=1)
    attention_block: int | None = _choice(None, None, least=1)
    micro_batches: int = _choice(1, least=1)
    cache_bytes: int = _choice(64 * MIB, least=0)
    reason: str = "as given"

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.metadata:
                _check(item.name, getattr(self, item.name), **item.metadata)
        if self.kept_blocks and self.tile_tokens is not None:
            raise EdgeLoraError(
                f"kept_blocks: got {self.kept_blocks} with tile_tokens {self.tile_tokens}, "
                "expected one of them: blocks computed by tiles cannot be kept"
            )
        if self.mlp_weights == "rows" and None in (self.tile_tokens, self.mlp_bytes):
            raise EdgeLoraError(
                'mlp_weights: got "rows" without tile_tokens and mlp_bytes, expected both'
            )

    @property
    def streams(self) -> bool:
        """Whether frozen weights of any block are read from disk."""
        return self.streamed_blocks != 0

    @property
    def reads_head(self) -> bool:
        """Whether the embedding and the head are read from disk."""
        return self.head == "streamed" and self.streams

    @property
    def spills(self) -> bool:
        """Whether the inputs of blocks are stored in a file."""
        return self.inputs == "file"

    @classmethod
    def from_json(cls, text: str, place: str) -> "Plan":
        """Parse the output of `json`, possibly edited.

        Args:
            text: the plan as JSON.
            place: where the text is from; error messages begin with it.

        Raises:
            EdgeLoraError: the text is not a plan.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("version", None) != VERSION:
                raise ValueError(f"no object with version {VERSION}")
        except (ValueError, RecursionError) as error:
            raise EdgeLoraError(
                f"{place}: not a plan ({error}), expected JSON as --plan-out writes it"
            ) from error
        names = [item.name for item in fields(cls)]
        for key in values:
            if key not in names:
                raise EdgeLoraError(
                    f"{place}: {key}: unknown choice, expected some of {', '.join(names)}"
                )
        try:
            return cls(**values)
        except EdgeLoraError as error:
            raise EdgeLoraError(f"{place}: {error}") from None

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read a plan from a file.

        Raises:
            EdgeLoraError: the file cannot be read or is not a plan.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise EdgeLoraError(
                f"{path}: cannot be read ({reason}), expected a plan as --plan-out writes it"
            ) from error
        return cls.from_json(text, str(path))

    def json(self) -> str:
        """The plan as JSON, for `from_json`."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    def _counts(self, blocks: int) -> tuple[int, int]:
        """Number of streamed blocks and of kept blocks in a model of `blocks` blocks."""
        streamed = blocks if self.streamed_blocks is None else min(self.streamed_blocks, blocks)
        return streamed, min(self.kept_blocks, blocks)

    def rows(self, blocks: int) -> Mapping[str, str]:
        """The plan in words for a model of `blocks` blocks, by subject."""
        streamed, kept = self._counts(blocks)
        rows = {
            "weights": _split(streamed, blocks, "from disk", "in memory")
            + ", the next block read ahead" * (self.prefetch and streamed > 0),
            "embedding and head": "from disk" if self.head == "streamed" else "in memory",
            "activations": _split(blocks - kept, blocks, "recomputed", "kept"),
            "inputs of blocks": "in a file" if self.spills and kept < blocks else "in memory",
            "adapters": "in memory" if self.adapters == "resident" else "in a file",
            "token tiles": "none"
            if self.tile_tokens is None
            else f"{self.tile_tokens} tokens at a time",
            "MLP": "layer by layer"
            if self.mlp_bytes is None
            else f"slices of {size(self.mlp_bytes)}"
            + ", read for each tile" * (self.mlp_weights == "rows"),
            "head": f"tiles of {size(self.loss_bytes)}",
        }
        if self.key_tokens is not None and self.spills:
            rows["gradients of keys"] = f"{self.key_tokens} tokens at a time"
        if self.kernel != "auto":
            fused = self.kernel == "fused"
            rows["quantized matrices"] = "MLX's kernel" if fused else "dequantized first"
        if self.attention_block is not None:
            block = self.attention_block
            rows["attention gradient"] = f"{block} x {block} scores at a time"
        if self.micro_batches > 1:
            rows["batch"] = f"in {self.micro_batches} parts"
        return rows

    def summary(self, blocks: int) -> str:
        """The main choices for a model of `blocks` blocks, in a sentence."""
        streamed, kept = self._counts(blocks)
        words = ["weights " + _split(streamed, blocks, "from disk", "in memory")]
        if self.reads_head and streamed < blocks:
            words.append("embedding and head from disk")
        words.append("activations " + _split(blocks - kept, blocks, "recomputed", "kept"))
        if self.tile_tokens is not None:
            words.append(f"{self.tile_tokens} tokens at a time")
        if self.micro_batches > 1:
            words.append(f"batches in {self.micro_batches} parts")
        files = [
            name
            for name, waits in (
                ("block inputs", self.spills and kept < blocks),
                ("adapters", self.adapters == "paged"),
            )
            if waits
        ]
        if files:
            words.append(f"{' and '.join(files)} in a scratch file")
        return "; ".join(words)

    def describe(self, blocks: int) -> str:
        """All choices for a model of `blocks` blocks and the reason, in one line."""
        words = "; ".join(f"{name} {value}" for name, value in self.rows(blocks).items())
        return f"{words} ({self.reason})"


def _check(name: str, value: Any, values: tuple, least: int | None) -> None:
    most = MOST_BYTES if name.endswith("_bytes") else MOST_COUNT
    if least is not None and type(value) is int and least <= value <= most:  # excludes bool
        return
    if any(value is choice for choice in values) or (isinstance(value, str) and value in values):
        return
    choices = [json.dumps(choice) for choice in values]
    if least is not None:
        choices.append(f"a whole number of at least {least}, and at most {most}")
    raise EdgeLoraError(f"{name}: got {shown(value)}, expected {' or '.join(choices)}")


def _split(first: int, count: int, one: str, other: str) -> str:
    """Name the placement of the first `first` of `count` blocks and that of the rest."""
    if first in (0, count):
        return other if first == 0 else one
    return f"{first} of {count} blocks {one}, {count - first} {other}"
