"""What a step takes by a plan: bytes by phase and block. Nothing is computed.

Bytes are what is held for certain (weights, adapters, inputs that wait, kept activations)
and what a phase needs on top. The latter is a sum of array sizes, or the larger of two, each size
times a number that was fitted to steps measured on a CPU (`planner/fitted.py`): how many
such arrays autodiff keeps and MLX's scheduler has ahead cannot be told from the model.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from mlx_edgelora.layers.mlp import TOKENS, slice_features
from mlx_edgelora.losses.exact import tile_shape
from mlx_edgelora.planner.fitted import FITTED
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.sizes import ModelShape

# AdamW and most others keep two numbers for each one that is trained.
MOMENTS = 2
FLOAT = 4
# The numbers were fitted to steps of an engine that stopped at each slice and tile. 40 steps of the
# present one, blocks whole, by tiles and kept, without a memory limit, took 1.22 times as much on
# top (median; half of them 1.04 to 1.45); what is kept is as large as it was. A narrow budget is
# tried before the first step (`training/rehearsal.py`).
GROWN = 1.2
# Tiles of the head up to this size are in the fitted numbers.
LARGE = 40 * 2**20
# Of a backward by tiles, as `measure/profile.py` names them; each may be its peak.
STAGES = ("recompute", "MLP backward", "attention backward")


@dataclass(frozen=True)
class Load:
    """A batch, as far as its cost goes.

    Attributes:
        rows: of the batch.
        tokens: of a row, padding included.
        labelled: tokens of the batch that carry a label.
    """

    rows: int
    tokens: int
    labelled: int

    @property
    def size(self) -> int:
        """All tokens."""
        return self.rows * self.tokens

    def part(self, count: int) -> "Load":
        """The largest of so many parts of the rows."""
        rows = -(-self.rows // min(count, self.rows))
        return Load(rows, self.tokens, min(self.labelled, -(-self.labelled * rows // self.rows)))


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        name: as in `measure/profile.py`.
        block: its index; None outside of blocks.
        held: bytes that are there whatever happens in it.
        kind: which of the fitted sums it takes on top; of two the larger.
        sizes: the terms of these sums, in bytes.
    """

    name: str
    block: int | None
    held: int
    kind: str
    sizes: Mapping[str, float]

    @property
    def bytes(self) -> int:
        """What is held and what is needed on top."""
        sums = FITTED.get(self.kind, [{}])
        grown = 1.0 if self.block is None or self.kind.startswith("kept") else GROWN
        return round(
            self.held
            + grown
            * max(sum(w * self.sizes.get(k, 0.0) for k, w in terms.items()) for terms in sums)
        )


class Memory:
    """The phases of a step that may be its peak.

    Args:
        shape: of the model.
        load: the batch; with micro-batches its largest part counts.
        plan: how it is computed.
    """

    def __init__(self, shape: ModelShape, load: Load, plan: Plan) -> None:
        self.shape, self.plan = shape, plan
        self.load = load.part(plan.micro_batches)
        count = shape.blocks
        streamed = count if plan.streamed_blocks is None else min(plan.streamed_blocks, count)
        self.first = count - shape.adapted
        self.by_tiles = plan.tile_tokens is not None and self.load.size > plan.tile_tokens
        self.kept = 0 if self.by_tiles else min(plan.kept_blocks, shape.adapted)
        self.streamed = streamed
        self.hidden = self.load.size * shape.hidden * shape.itemsize
        self.paged = plan.adapters == "paged"
        self._known: dict[tuple[bool, bool], dict[str, float]] = {}
        self.base = (
            shape.outside_bytes
            # As a part of a graph a head on disk is read whole.
            + (shape.head_bytes if plan.head == "resident" or not plan.streams or self.kept else 0)
            # There its tiles are not evaluated one by one, and MLX has some of them ahead.
            + (2 * plan.loss_bytes if self.kept and plan.loss_bytes > LARGE else 0)
            + (count - streamed) * shape.block_bytes
            + shape.outside_adapter_bytes * (1 + MOMENTS)
        )
        if not self.paged:
            self.base += (1 + MOMENTS) * shape.adapted * shape.adapter_bytes

    def peak(self) -> int:
        """Bytes that MLX's allocator will hold at most.

        What is held grows evenly from block to block up to the ends of the ranges that the plan
        names, so only the blocks at these ends are looked at.
        """
        count = self.shape.blocks
        ends = {0, self.first, self.streamed, count - self.kept, count}
        wanted = {end + step for end in ends for step in (-2, -1, 0, 1)}
        largest: dict[tuple[str, int], Phase] = {}  # of those that need the same on top
        for phase in self.phases(wanted):
            known = largest.setdefault((phase.kind, id(phase.sizes)), phase)
            if phase.held > known.held:
                largest[phase.kind, id(phase.sizes)] = phase
        return max(phase.bytes for phase in largest.values())

    def phases(self, blocks: Container[int] | None = None) -> Iterator[Phase]:
        """All of them in order, or those of some blocks and outside of blocks."""
        wanted = range(self.shape.blocks) if blocks is None else blocks
        yield from self._by_tiles(wanted) if self.by_tiles else self._whole(wanted)
        yield self._update()

    def _whole(self, wanted: Container[int]) -> Iterator[Phase]:
        last = self.shape.blocks - self.kept
        mlp = "layers" if self.plan.mlp_bytes is None or not self.shape.gated else "slices"
        kept_kind = "" if self.shape.packed else ", not packed"
        mlp += kept_kind
        for index in filter(wanted.__contains__, range(last)):
            held = self.base + self._waiting(index) + self.hidden + self._weights(index, index + 1)
            yield Phase("forward", index, held, f"forward, {mlp}", self._sizes(index))
        kept_held = self.base + self._waiting(last)
        if self.kept:
            kept_held += self.hidden + self._kept_weights(0)
            sizes = self._kept_sizes(last, self.shape.blocks)
            yield Phase("forward", last, kept_held, "kept forward" + kept_kind, sizes)
        yield self._head(kept_held, self._kept_sizes(last, self.shape.blocks))
        for index in filter(wanted.__contains__, range(self.shape.blocks - 1, last - 1, -1)):
            above = self.shape.blocks - 1 - index
            held = self.base + self._waiting(last) + self._gradients(above)
            held += self.hidden + self._kept_weights(above)
            sizes = self._kept_sizes(last, index + 1)
            yield Phase("backward", index, held, "kept backward" + kept_kind, sizes)
        for index in filter(wanted.__contains__, range(last - 1, self.first - 1, -1)):
            above = self.shape.blocks - 1 - index
            held = self.base + self._waiting(index) + self._gradients(above)
            held += 2 * self.hidden + self._weights(index, index - 1)
            yield Phase("backward", index, held, f"backward, {mlp}", self._sizes(index))

    def _by_tiles(self, wanted: Container[int]) -> Iterator[Phase]:
        shape, load = self.shape, self.load
        keys, in_memory = self._keys(), not self.plan.spills
        labelled = min(load.labelled, load.size) * shape.hidden * shape.itemsize
        sliced = self.plan.mlp_bytes is not None and shape.gated
        yield Phase("load", None, self.base + self.hidden, "embedding", self._sizes(0))
        for index in filter(wanted.__contains__, range(shape.blocks)):
            kept = max(0, index - self.first) * self.hidden * in_memory
            held = self.base + kept + keys + self._weights(index, index + 1)
            # Nothing was measured of tiles layer by layer: what whole blocks of so many tokens
            # take is more than that.
            kind = "forward by tiles, block" if sliced else "forward, layers"
            yield Phase("forward", index, held, kind, self._sizes(index))
        yield self._head(self.base + in_memory * shape.adapted * self.hidden)
        # Beside keys and values the float32 sums of their gradients, and what one tile adds.
        sums = keys + load.size * shape.keys * FLOAT
        for index in filter(wanted.__contains__, range(shape.blocks - 1, self.first - 1, -1)):
            above = shape.blocks - 1 - index
            kept = (index + 1 - self.first) * self.hidden + self.hidden
            if above == 0:
                kept -= self.hidden - labelled
            held = self.base + in_memory * kept + self._gradients(above) + keys + sums
            held += self._weights(index, index - 1)
            kinds = [f"{stage} by tiles, block" for stage in STAGES]
            for kind in kinds if sliced else ["backward, layers"]:
                yield Phase("backward", index, held, kind, self._sizes(index))

    def _kept_sizes(self, first: int, stop: int) -> dict[str, float]:
        """What the activations of some blocks are as large as, and those of the last of them."""
        total: dict[str, float] = {}
        if stop > first:
            last = self._sizes(stop - 1)
            lower = self._sizes(0) if stop - 1 > first else last
            for name in ("hidden", "hidden float", "queries", "keys", "intermediate", "rank"):
                total[f"kept {name}"] = last[name] + (stop - 1 - first) * lower[name]
            total.update(last)
        return total

    def _head(self, held: int, kept: Mapping[str, float] | None = None) -> Phase:
        shape, load, plan = self.shape, self.load, self.plan
        labelled = load.labelled * shape.hidden
        rows, chunk = tile_shape(plan.loss_bytes, shape.hidden, load.labelled, shape.vocabulary)
        sizes = {
            "rows": FLOAT * rows * shape.hidden,
            "logits": FLOAT * rows * chunk,
            "chunk": FLOAT * chunk * shape.hidden,
            "labelled": labelled * FLOAT,
            "labelled hidden": labelled * shape.itemsize,
            "one": 2.0**20,
        }
        sizes |= {name: size for name, size in (kept or {}).items() if name.startswith("kept")}
        return Phase("head", None, held + labelled * shape.itemsize, "head", sizes)

    def _update(self) -> Phase:
        shape = self.shape
        held = self.base + shape.outside_adapter_bytes + self._gradients(shape.adapted)
        kind = "update, paged" if self.paged else "update"
        own = shape.adapter_bytes * (1 if self.paged else shape.adapted)
        return Phase("update", None, held, kind, {"adapters": own, "one": 2.0**20})

    def _sizes(self, index: int) -> Mapping[str, float]:
        """What arrays inside a block are as large as; much of the last one is for labelled tokens.

        Sizes of a tile where the block is computed by tiles.
        """
        key = index + 1 == self.shape.blocks, index >= self.streamed
        if key not in self._known:  # a search asks some hundred thousand times
            self._known[key] = self._measured(*key)
        return self._known[key]

    def _measured(self, last: bool, resident: bool) -> dict[str, float]:
        shape, load = self.shape, self.load
        most, spans = load.size, 1
        if self.by_tiles:
            spans = -(-load.tokens // max(1, self.plan.tile_tokens // load.rows))
            most = load.rows * -(-load.tokens // spans)
        tokens = most
        if last and load.labelled < load.size:
            # By tiles those of a row are computed apart.
            rows = load.rows if self.by_tiles else 1
            tokens = min(most // rows, -(-load.labelled // rows))
        hidden = tokens * shape.hidden * shape.itemsize
        every = most * shape.hidden * shape.itemsize
        return {
            "hidden": hidden,
            "hidden float": tokens * shape.hidden * FLOAT,
            "queries": tokens * shape.queries * shape.itemsize,
            "queries float": tokens * shape.queries * FLOAT,
            "intermediate": tokens * shape.intermediate * shape.itemsize,
            "rank": tokens * shape.rank * FLOAT,
            "every hidden": every,
            "every key": most * shape.keys * shape.itemsize,
            # MLX runs farther ahead where there are no weights to wait for.
            "resident hidden": resident * hidden,
            "resident every hidden": resident * every,
            "keys": self._keys(),
            "adapters": shape.adapter_bytes,
            "adapters out": shape.adapter_bytes * shape.itemsize / FLOAT,
            # Where there is more than one tile, gradients are added to a sum.
            "added hidden": (spans > 1) * most * shape.hidden * FLOAT,
            "added keys": (spans > 1) * most * shape.keys * FLOAT,
            "added adapters": (spans > 1) * shape.adapter_bytes,
            **(self._streams(hidden, last) if self.by_tiles else {}),
            **self._slice(tokens),
            "one": 2.0**20,
        }

    def _streams(self, hidden: int, last: bool) -> dict[str, float]:
        """What a part of a block reads tile by tile, and what it writes."""
        shape, load = self.shape, self.load
        tokens = min(load.labelled, load.size) if last else load.size
        out = tokens * shape.hidden * shape.itemsize
        sizes = {"last out": last * out}  # the head's input is never in the file
        if self.plan.spills:
            return sizes | {"read hidden": hidden}
        # Tiles are parts of what waits in memory; so are the gradients of keys and values.
        keys = load.size * shape.keys * FLOAT
        return sizes | {"stream in": self.hidden, "stream out": out, "stream keys": keys}

    def _slice(self, tokens: int) -> dict[str, float]:
        """The weights and the activations of a slice of an MLP (`layers/mlp.py`)."""
        shape, most = self.shape, self.plan.mlp_bytes
        if most is None or not shape.gated:
            return {}
        tokens = min(TOKENS, tokens)
        group = 64 if shape.packed else 1
        features = slice_features(most, 3 * shape.hidden, tokens, shape.intermediate, group)
        features = min(shape.intermediate, features)
        return {
            "slice weights": FLOAT * 3 * shape.hidden * features,
            "slice": FLOAT * tokens * features,
        }

    def _keys(self) -> int:
        return self.load.size * self.shape.keys * self.shape.itemsize

    def _waiting(self, index: int) -> int:
        """Inputs in memory of the blocks from the first to `index`, itself not included."""
        return 0 if self.plan.spills else max(0, index - self.first) * self.hidden

    def _gradients(self, blocks: int) -> int:
        """Sums of gradients of so many last blocks."""
        if self.paged:
            return 0
        return min(blocks, self.shape.adapted) * self.shape.adapter_bytes

    def _weights(self, index: int, following: int) -> int:
        """Of a block and the one that is read ahead, as far as they do not stay in memory."""
        held = self.shape.block_bytes if index < self.streamed else 0
        ahead = 0 <= following < self.streamed and self.plan.prefetch
        held += self.shape.block_bytes if ahead else 0
        return held + (self.shape.adapter_bytes if self.paged else 0)

    def _kept_weights(self, done: int) -> int:
        """Of the kept blocks whose backward is not done, as far as they do not stay in memory."""
        last = self.shape.blocks - done
        first = self.shape.blocks - self.kept
        streamed = max(0, min(last, self.streamed) - first)
        return streamed * self.shape.block_bytes + self.paged * (
            (last - first) * self.shape.adapter_bytes
        )
