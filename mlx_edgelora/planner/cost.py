"""Estimate the memory of a step: bytes by phase and block, without running it.

The memory of a phase has two parts. Weights, adapters and stored inputs are known exactly. What
the computation needs in addition is measured on this machine (`planner/measured.py`) or estimated
by a formula (`planner/needs.py`).
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import partial

from mlx_edgelora.planner.measured import Estimate, Measurements, Way
from mlx_edgelora.planner.needs import FLOAT, need
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

# AdamW and most other optimizers keep two numbers for each trained parameter.
MOMENTS = 2


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        name: name of the phase, as in `measure/profile.py`.
        block: index of the block; None outside the blocks.
        held: bytes that are held during the whole phase.
        need: bytes that its computation needs in addition.
    """

    name: str
    block: int | None
    held: int
    need: Estimate

    @property
    def bytes(self) -> int:
        """Expected bytes."""
        return round(self.held + self.need.value)

    @property
    def upper_bytes(self) -> int:
        """Upper bound of the expected bytes."""
        return round(self.held + self.need.value * self.need.spread)


class Memory:
    """The memory of a step by a plan.

    Args:
        shape: sizes of the model.
        batch_shape: sizes of the batch; with micro-batches, its largest part is taken.
        plan: the plan.
        measurements: measurements of this machine.
        base: bytes in memory before a step; None computes them from the plan.
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
        self._parts = min(plan.micro_batches, batch_shape.most_parts)
        count = shape.blocks
        streamed = count if plan.streamed_blocks is None else min(plan.streamed_blocks, count)
        self.first = count - shape.adapted
        self.by_tiles = plan.tile_tokens is not None and self.batch_shape.size > plan.tile_tokens
        self.kept = 0 if self.by_tiles else min(plan.kept_blocks, shape.adapted)
        self.streamed = streamed
        self.hidden = self.batch_shape.size * shape.hidden * shape.itemsize
        self.paged = plan.adapters == "paged"
        # MLX allocates further ahead if it does not wait for weights.
        resident = streamed < count - self.kept
        self.ways = ways_of(plan, self.by_tiles, self.kept, resident)
        self.base = (self._base() if base is None else base) + self._ring() + self._shared()

    def _base(self) -> int:
        shape = self.shape
        base = shape.outside_bytes + (0 if self.plan.reads_head else shape.head_bytes)
        base += shape.frozen_bytes(self.streamed, shape.frozen_blocks)
        base += shape.outside_adapter_bytes * (1 + MOMENTS)
        if not self.paged:
            base += (1 + MOMENTS) * shape.trained_bytes(self.first, shape.blocks)
        return base

    def peak(self) -> tuple[int, int]:
        """Expected peak of MLX's allocator in bytes, and its upper bound.

        Between the ends of the ranges of blocks that the plan names, memory changes linearly from
        block to block, so only the blocks at these ends are examined.
        """
        count = self.shape.blocks
        ends = {0, self.first, self.streamed, count - self.kept, count}
        wanted = {end + step for end in ends for step in (-2, -1, 0, 1)}
        phases = list(self.phases(wanted))
        factor = self.measurements.correction
        expected = max(phase.bytes for phase in phases)
        return round(factor * expected), round(factor * max(phase.upper_bytes for phase in phases))

    def phases(self, blocks: Container[int] | None = None) -> Iterator[Phase]:
        """The phases in order: all of them, or those of `blocks` and those outside the blocks."""
        shape = self.shape
        wanted = range(shape.blocks) if blocks is None else blocks
        last = shape.blocks - self.kept
        yield Phase("load", None, self.base + self.hidden, self._need("load"))
        forward, backward = self._need("forward"), self._need("backward")
        keys = self._keys()
        earlier = self._earlier_gradients()
        ahead = self._ring(kept=True) - self._ring()
        for index in filter(wanted.__contains__, range(last)):
            held = self.base + self._waiting(index) + self._paged_block + earlier + ahead
            yield Phase("forward", index, held + self._input() + keys, forward)
        held = self.base + self._waiting(last) + earlier
        labelled = self.batch_shape.labelled * shape.hidden * shape.itemsize
        if self.kept:
            held += self._input() + self._kept_weights()
            held += self.paged * shape.trained_bytes(last, shape.blocks)
            yield Phase("backward", last, held, self._need("tail"))
        else:
            yield Phase("head", None, held + labelled, self._need("head"))
        sums = self.by_tiles * self._summed_tokens() * shape.keys * FLOAT
        for index in filter(wanted.__contains__, range(last - 1, self.first - 1, -1)):
            above = shape.blocks - 1 - index
            held = self.base + self._waiting(index) + max(earlier, self._gradients(above))
            # The block's input and the gradient of its output.
            held += 2 * self._input() + self._paged_block + keys + sums
            if self.by_tiles and not self.plan.spills and above == 0:  # of labelled tokens alone
                held -= max(0, self.hidden - labelled)
            yield Phase("backward", index, held, backward)
        held = self.base + shape.outside_adapter_bytes + self._gradients(shape.adapted)
        yield Phase("update", None, held, self._need("update"))

    def kind(self, phase: str) -> str:
        """Kind under which a phase is measured."""
        return f"tiles {phase}" if self.by_tiles and phase in ("forward", "backward") else phase

    def _need(self, phase: str) -> Estimate:
        kind = self.kind(phase)
        formula = partial(need, kind, self.shape, on_gpu=self.measurements.overlaps)
        return self.measurements.bytes(kind, self.ways[phase], self.batch_shape, formula)

    def _input(self) -> int:
        """Bytes of a block's input while the block is computed; 0 if it stays in a file."""
        return self.hidden if not self.by_tiles or not self.plan.spills else 0

    def _keys(self) -> int:
        """Bytes of the keys and values of all tokens, if blocks are computed by tiles."""
        return self.by_tiles * self.batch_shape.size * self.shape.keys * self.shape.itemsize

    def _summed_tokens(self) -> int:
        """Tokens whose gradients of keys and values are summed at a time."""
        tokens = self.batch_shape.tokens
        if self.plan.key_tokens is not None and self.plan.spills:
            tokens = min(tokens, self.plan.key_tokens)
        return self.batch_shape.rows * tokens

    def _waiting(self, index: int) -> int:
        """Bytes of the inputs in memory of the adapted blocks before block `index`."""
        return 0 if self.plan.spills else max(0, index - self.first) * self.hidden

    def _shared(self) -> int:
        """Bytes of what all blocks are given of each token, and of what they give each other.

        The latter is stored as inputs of blocks are, with float32 sums of its gradients.
        """
        shape, tokens = self.shape, self.batch_shape.size
        entry = 0 if self.plan.spills else shape.shared * (shape.itemsize + 4)
        return tokens * (shape.arguments * shape.itemsize + entry)

    def _earlier_gradients(self) -> int:
        """Bytes of the summed gradients of earlier batches, or of earlier parts of this one."""
        several = self.shape.accumulates or self._parts > 1
        return several * (self._gradients(self.shape.adapted) + self.shape.outside_adapter_bytes)

    def _gradients(self, blocks: int) -> int:
        """Bytes of the summed gradients of the last `blocks` blocks."""
        if self.paged:
            return 0
        count = self.shape.blocks
        return self.shape.trained_bytes(count - min(blocks, self.shape.adapted), count)

    def _ring(self, kept: bool = False) -> int:
        """Bytes of the buffers into which the weights of streamed blocks are read.

        Args:
            kept: whether kept blocks are read as well, as in a forward pass.
        """
        # On a GPU, a block is still computed while the next one is read, even if both are the same.
        more = self.measurements.overlaps and self.plan.prefetch
        buffers = 1 + self.plan.prefetch + more
        visited = min(self.streamed, self.shape.blocks - self.kept, self.shape.frozen_blocks)
        if visited and kept and self.plan.reads_head:  # else they are read after these are freed
            visited = min(self.streamed, self.shape.frozen_blocks)
        one = self.shape.read_bytes(grouped=self.plan.mlp_bytes is not None)
        if self.by_tiles and self.plan.mlp_weights == "rows":
            one -= self.shape.row_bytes
        return min(visited and visited + more, buffers) * one

    @property
    def _paged_block(self) -> int:
        """Bytes of the adapters of the current block, if adapters are kept in a file."""
        return self.paged * self.shape.adapter_bytes

    def _kept_weights(self) -> int:
        """Bytes of the streamed weights of kept blocks, in addition to the ring of buffers."""
        first = self.shape.blocks - self.kept
        streamed = min(self.streamed, self.shape.frozen_blocks)
        # They take the memory of the ring.
        return max(self.shape.frozen_bytes(first, streamed), self._ring(kept=True)) - self._ring()


def ways_of(plan: Plan, by_tiles: bool, kept: int, resident: bool) -> dict[str, Way]:
    """The settings of a plan that decide the cost of each kind of phase.

    Args:
        plan: the plan.
        by_tiles: whether the batch is larger than a tile.
        kept: number of last blocks whose activations are kept.
        resident: whether weights of other blocks stay in memory.
    """
    tile_tokens = plan.tile_tokens if by_tiles else None
    block = (
        tile_tokens,
        plan.mlp_bytes,
        plan.kernel,
        resident,
        plan.attention_block,
        plan.mlp_weights,
        # Tiles of other arrays than inputs, such as those of experts, are in the same place.
        plan.inputs if by_tiles else None,
    )
    place = "streamed" if plan.reads_head else "resident"
    return {
        "load": (),
        "forward": block,
        "backward": block,
        "head": (plan.loss_bytes, place),
        "tail": (kept, plan.loss_bytes, plan.kernel, place, plan.attention_block),
        "update": (plan.adapters,),
    }
