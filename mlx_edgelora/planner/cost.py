"""What a step takes by a plan: bytes by phase and block. Nothing is computed.

Bytes are what is held for certain (weights, adapters, inputs that wait) and what a phase needs on
top. The latter was measured on this machine (`planner/measured.py`), or is a formula's.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import partial

from mlx_edgelora.planner.measured import Estimate, Measurements, Way
from mlx_edgelora.planner.needs import FLOAT, need
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

# AdamW and most others keep two numbers for each one that is trained.
MOMENTS = 2


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        name: as in `measure/profile.py`.
        block: its index; None outside of blocks.
        held: bytes that are there whatever happens in it.
        need: what it needs on top.
    """

    name: str
    block: int | None
    held: int
    need: Estimate

    @property
    def bytes(self) -> int:
        """What is expected."""
        return round(self.held + self.need.value)

    @property
    def upper_bytes(self) -> int:
        """What it may be."""
        return round(self.held + self.need.value * self.need.spread)


class Memory:
    """The phases of a step that may be its peak.

    Args:
        shape: of the model.
        batch_shape: the batch; with micro-batches its largest part counts.
        plan: how it is computed.
        measurements: what was measured.
        base: what is in memory before a step; None for what the plan leaves there.
    """

    def __init__(
        self,
        shape: ModelShape,
        batch_shape: BatchShape,
        plan: Plan,
        measurements: Measurements | None = None,
        base: int | None = None,
    ) -> None:
        self.shape, self.plan = shape, plan
        self.measurements = Measurements() if measurements is None else measurements
        self.batch_shape = batch_shape.part(plan.micro_batches)
        count = shape.blocks
        streamed = count if plan.streamed_blocks is None else min(plan.streamed_blocks, count)
        self.first = count - shape.adapted
        self.by_tiles = plan.tile_tokens is not None and self.batch_shape.size > plan.tile_tokens
        self.kept = 0 if self.by_tiles else min(plan.kept_blocks, shape.adapted)
        self.streamed = streamed
        self.hidden = self.batch_shape.size * shape.hidden * shape.itemsize
        self.paged = plan.adapters == "paged"
        # MLX runs farther ahead where there are no weights to wait for.
        resident = streamed < count - self.kept
        self.ways = ways_of(plan, self.by_tiles, self.kept, resident)
        self.base = (self._base() if base is None else base) + self._ring()

    def _base(self) -> int:
        shape = self.shape
        base = shape.outside_bytes + (0 if self.plan.reads_head else shape.head_bytes)
        base += (shape.blocks - self.streamed) * shape.block_bytes
        base += shape.outside_adapter_bytes * (1 + MOMENTS)
        if not self.paged:
            base += (1 + MOMENTS) * shape.adapted * shape.adapter_bytes
        return base

    def peak(self) -> tuple[int, int]:
        """Bytes that MLX's allocator is expected to hold at most, and what it may be.

        What is held grows evenly from block to block up to the ends of the ranges that the plan
        names, so only the blocks at these ends are looked at.
        """
        count = self.shape.blocks
        ends = {0, self.first, self.streamed, count - self.kept, count}
        wanted = {end + step for end in ends for step in (-2, -1, 0, 1)}
        phases = list(self.phases(wanted))
        factor = self.measurements.correction
        expected = max(phase.bytes for phase in phases)
        return round(factor * expected), round(factor * max(phase.upper_bytes for phase in phases))

    def phases(self, blocks: Container[int] | None = None) -> Iterator[Phase]:
        """All of them in order, or those of some blocks and outside of blocks."""
        shape = self.shape
        wanted = range(shape.blocks) if blocks is None else blocks
        last = shape.blocks - self.kept
        yield Phase("load", None, self.base + self.hidden, self._need("load"))
        forward, backward = self._need("forward"), self._need("backward")
        keys = self._keys()
        for index in filter(wanted.__contains__, range(last)):
            held = self.base + self._waiting(index) + self._paged_block
            yield Phase("forward", index, held + self._input() + keys, forward)
        held = self.base + self._waiting(last)
        if self.kept:
            held += self._input() + self._kept_weights()
            held += self.paged * self.kept * shape.adapter_bytes
            yield Phase("backward", last, held, self._need("tail"))
        else:
            labelled = self.batch_shape.labelled * shape.hidden * shape.itemsize
            yield Phase("head", None, held + labelled, self._need("head"))
        sums = self.by_tiles * self.batch_shape.size * shape.keys * FLOAT
        for index in filter(wanted.__contains__, range(last - 1, self.first - 1, -1)):
            above = shape.blocks - 1 - index
            held = self.base + self._waiting(index) + self._gradients(above)
            # Its input and the gradient of its output.
            held += 2 * self._input() + self._paged_block + keys + sums
            yield Phase("backward", index, held, backward)
        held = self.base + shape.outside_adapter_bytes + self._gradients(shape.adapted)
        yield Phase("update", None, held, self._need("update"))

    def kind(self, phase: str) -> str:
        """What a phase is measured as."""
        return f"tiles {phase}" if self.by_tiles and phase in ("forward", "backward") else phase

    def _need(self, phase: str) -> Estimate:
        kind = self.kind(phase)
        return self.measurements.bytes(
            kind, self.ways[phase], self.batch_shape, partial(need, kind, self.shape)
        )

    def _input(self) -> int:
        """Of a block's input, where it is in memory while the block is computed."""
        return self.hidden if not self.by_tiles or not self.plan.spills else 0

    def _keys(self) -> int:
        """Keys and values of all tokens, where a block is computed by tiles."""
        return self.by_tiles * self.batch_shape.size * self.shape.keys * self.shape.itemsize

    def _waiting(self, index: int) -> int:
        """Inputs in memory of the blocks from the first to `index`, itself not included."""
        return 0 if self.plan.spills else max(0, index - self.first) * self.hidden

    def _gradients(self, blocks: int) -> int:
        """Sums of gradients of so many last blocks."""
        if self.paged:
            return 0
        return min(blocks, self.shape.adapted) * self.shape.adapter_bytes

    def _ring(self) -> int:
        """The memory into which blocks' weights are read, again and again."""
        # On a GPU the block before is still computed while the next one is read, be it the same.
        more = self.measurements.overlaps and self.plan.prefetch
        buffers = 1 + self.plan.prefetch + more
        visited = min(self.streamed, self.shape.blocks - self.kept)
        return min(visited and visited + more, buffers) * self.shape.block_bytes

    @property
    def _paged_block(self) -> int:
        """Adapters of the block that is computed, where they wait in a file."""
        return self.paged * self.shape.adapter_bytes

    def _kept_weights(self) -> int:
        """Of kept blocks, beside the ring, as far as they do not stay in memory."""
        first = self.shape.blocks - self.kept
        held = max(0, self.streamed - first) * self.shape.block_bytes
        # They take the ring's memory, and one more block is begun at the end.
        return held - max(0, min(held, self._ring()) - self.plan.prefetch * self.shape.block_bytes)


def ways_of(plan: Plan, by_tiles: bool, kept: int, resident: bool) -> dict[str, Way]:
    """How a plan computes each kind of phase, as far as that decides what is needed.

    Args:
        plan: which.
        by_tiles: whether the batch is larger than a tile.
        kept: blocks at the end.
        resident: whether the weights of others stay in memory.
    """
    tile_tokens = plan.tile_tokens if by_tiles else None
    block = (tile_tokens, plan.mlp_bytes, plan.kernel, resident, plan.attention_block)
    place = "streamed" if plan.reads_head else "resident"
    return {
        "load": (),
        "forward": block,
        "backward": block,
        "head": (plan.loss_bytes, place),
        "tail": (kept, plan.loss_bytes, plan.kernel, place, plan.attention_block),
        "update": (plan.adapters,),
    }
