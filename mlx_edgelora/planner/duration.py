"""Estimate the time of a step by a plan: from measurements, or from operations and rates."""

from functools import partial

from mlx_edgelora.layers.fused import BLOCK
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.machine import Machine
from mlx_edgelora.planner.measured import Measurements, Way
from mlx_edgelora.planner.needs import FLOAT
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

# Number of small operations in the forward and the backward of a block, and in each further tile.
FORWARD_CALLS, BACKWARD_CALLS, TILE_CALLS = 150, 450, 200
# The same for a block of scores in MLX's gradient of attention on Metal. The number is a guess; it
# makes plans with fewer blocks of scores faster.
SCORE_CALLS = 10
# Number of arrays that elementwise operations read and write in a forward or a backward.
PASSES = {"hidden": 12, "queries": 8, "intermediate": 8}
# Share of its time that a transfer costs although it overlaps with computation.
OVERLAPPED = 0.4


def seconds(
    shape: ModelShape,
    batch_shape: BatchShape,
    plan: Plan,
    machine: Machine,
    measurements: Measurements | None = None,
) -> float:
    """Expected seconds of a whole step: forward, loss, backward and update."""
    part = batch_shape.part(plan.micro_batches)
    step = _Step(
        shape, part, plan, machine, Measurements() if measurements is None else measurements
    )
    return min(plan.micro_batches, batch_shape.most_parts) * step.batch() + step.update()


def longest_operation(
    shape: ModelShape, batch_shape: BatchShape, plan: Plan, machine: Machine
) -> float:
    """Expected seconds of the longest single operation in a block.

    This is the product with its largest matrix, or MLX's gradient of attention on Metal.
    """
    part = batch_shape.part(plan.micro_batches)
    tokens = part.size if plan.tile_tokens is None else min(part.size, plan.tile_tokens)
    kernel = machine.kernels[0] if plan.kernel == "auto" else plan.kernel
    fused = shape.packed and kernel == "fused"
    rate = machine.rates.fused_flops if fused else machine.rates.flops
    product = 2 * tokens * shape.hidden * max(shape.intermediate, shape.queries) / rate
    if not shape.blocked_heads:
        return product
    # Five products for the last tokens, which attend to nearly all others.
    pairs = tokens * min(part.tokens - tokens / part.rows / 2, part.attended)
    return max(product, 5 * 2 * pairs * shape.queries / machine.rates.flops)


# The phases whose time is measured.
TIMED = ("forward", "backward", "head", "tail")


class _Step:
    def __init__(
        self,
        shape: ModelShape,
        batch_shape: BatchShape,
        plan: Plan,
        machine: Machine,
        measurements: Measurements,
    ) -> None:
        self.shape, self.batch_shape, self.plan, self.measurements = (
            shape,
            batch_shape,
            plan,
            measurements,
        )
        self.rates, self.kernels = machine.rates, machine.kernels
        self.memory = Memory(shape, batch_shape, plan, measurements)
        measurements.set_pace(self._seconds)

    def batch(self) -> float:
        """Seconds of the forward, loss and backward of a batch or one part of it."""
        shape, memory = self.shape, self.memory
        below, trained = shape.blocks - memory.kept, shape.adapted - memory.kept
        spent = below * self._of("forward") + trained * self._of("backward")
        spent += self._of("tail" if memory.kept else "head")
        return spent + self.reading() + self._spilling()

    def update(self) -> float:
        """Seconds of the optimizer, including reads and writes of paged adapters."""
        size = self.shape.trained_bytes(self.memory.first, self.shape.blocks)
        spent = 10 * size / self.rates.moved
        if self.plan.adapters == "paged":
            spent += 6 * size / self.rates.read + 4 * size / self.rates.written
        return spent

    def reading(self) -> float:
        """Seconds of reading the weights of streamed blocks, in the forward and the backward."""
        memory, shape = self.memory, self.shape
        streamed = min(memory.streamed, shape.frozen_blocks)
        stop = max(memory.first, min(streamed, shape.blocks - memory.kept))
        size = shape.frozen_bytes(0, streamed) + shape.frozen_bytes(memory.first, stop)
        if not (memory.by_tiles and self.plan.mlp_weights == "rows"):
            return self._disk(size, self.rates.read, self.plan.prefetch)
        # Forward, and twice backward, for every tile; the next rows are read while some are used.
        tiles, again = -(-self.batch_shape.size // self.plan.tile_tokens), stop - memory.first
        rows = shape.row_bytes * tiles * (streamed + 2 * again)
        size -= shape.row_bytes * (streamed + again)
        spent = self._disk(size, self.rates.read, self.plan.prefetch)
        return spent + self._disk(rows, self.rates.read, True)

    def _spilling(self) -> float:
        memory = self.memory
        count = self.shape.blocks - memory.kept - memory.first
        size = self.plan.spills * count * memory.hidden
        if memory.by_tiles:  # gradients go through the file as well
            size = self.plan.spills * self.shape.blocks * memory.hidden * 3
            size += self._waiting_calls()
        spent = self._disk(size, self.rates.written, True)
        return spent + self._disk(size, self.rates.read, not memory.by_tiles)

    def _waiting_calls(self) -> float:
        """Bytes that tiles leave for the gradients of earlier keys, read again for each window."""
        batch, window = self.batch_shape, self.plan.key_tokens
        if window is None or not self.plan.spills or batch.tokens <= window:
            return 0
        size = batch.size * 2 * self.shape.queries * self.shape.itemsize
        return self.memory.shape.adapted * size * max(1.0, batch.tokens / window / 2)

    def _of(self, phase: str) -> float:
        """Seconds of a phase of one block, of the head, or of the kept blocks and the head."""
        memory, formula = self.memory, partial(self.formula, phase)
        return self.measurements.seconds(
            memory.kind(phase), memory.ways[phase], self.batch_shape, formula
        )

    def _seconds(self, kind: str, way: Way, batch_shape: BatchShape) -> float:
        """The formula's seconds for a measured kind of phase; 0 for an unknown kind."""
        phase = kind.removeprefix("tiles ")
        return self.formula(phase, way, batch_shape) if phase in TIMED else 0.0

    def formula(self, kind: str, way: Way, batch_shape: BatchShape) -> float:
        """Seconds of a phase by the formula, without measurements."""
        if kind == "head":
            return self._head(way[0], batch_shape, way[1] == "streamed")
        if kind == "tail":
            kept, loss_bytes, kernel, place, attention_block = way
            block = _BlockTime(
                self, (None, None, kernel, True, attention_block, "block", None), batch_shape
            )
            # In the last block, all but keys and values is computed for labelled tokens only.
            count = kept - 1 + batch_shape.labelled / batch_shape.size
            calls = BACKWARD_CALLS + SCORE_CALLS * block.score_blocks
            spent = kept * calls * self.rates.call
            spent += count * (block.forward() + block.backward())
            return spent + self._head(loss_bytes, batch_shape, place == "streamed")
        block = _BlockTime(self, way, batch_shape)
        calls = FORWARD_CALLS
        if kind == "backward":
            calls = BACKWARD_CALLS + SCORE_CALLS * block.score_blocks
        spent = (calls + TILE_CALLS * (block.tiles - 1)) * self.rates.call
        if kind == "forward":
            return spent + block.forward()
        return spent + block.again() + block.backward()

    def _head(self, loss_bytes: int, batch_shape: BatchShape, streamed: bool) -> float:
        shape = self.shape
        entries = batch_shape.labelled * shape.vocabulary
        spent = 4 * entries * shape.hidden / self.rates.flops
        if shape.head_packed:
            spent += shape.head_entries / self.rates.dequantized
        spent += 6 * FLOAT * entries / self.rates.moved
        if streamed:
            spent += shape.head_bytes / self.rates.read
        tiles = max(1, 16 * shape.head_entries // max(1, loss_bytes))
        return spent + 60 * tiles * self.rates.call

    @staticmethod
    def _disk(size: float, rate: float, overlapped: bool) -> float:
        return (OVERLAPPED if overlapped else 1.0) * size / rate


class _BlockTime:
    """Times of one block by a formula."""

    def __init__(self, step: _Step, way: Way, batch_shape: BatchShape) -> None:
        tile_tokens, mlp_bytes, kernel, _, attention_block, mlp_weights, _ = way
        self.shape, self.batch_shape, self.rates = step.shape, batch_shape, step.rates
        shape = step.shape
        self.tiles = 1 if tile_tokens is None else -(-batch_shape.size // tile_tokens)
        self.sliced = mlp_bytes is not None and shape.gated
        self.by_rows = self.sliced and mlp_weights == "rows"
        kernel = step.kernels[0] if kernel == "auto" else kernel
        # Entries that MLX's kernel multiplies without unpacking; slices of an MLP are unpacked.
        self.fused = 0
        if shape.packed and kernel == "fused":
            self.fused = shape.block_weights - (shape.mlp_weights if self.sliced else 0)
        self.dense = shape.block_weights - self.fused
        self.score_blocks = 0
        if shape.blocked_heads:
            size, queries = attention_block or BLOCK, -(-batch_shape.tokens // self.tiles)
            self.score_blocks = self.tiles * -(-queries // size) * -(-batch_shape.tokens // size)
        # Seconds of unpacking the other entries in one pass over all tokens.
        self.unpack = shape.packed * self.tiles * self.dense / self.rates.dequantized

    def forward(self) -> float:
        """Seconds of the forward, without scheduling on the host."""
        return self._product() + self.unpack + self._attention(2) + self._entrywise()

    def again(self) -> float:
        """Seconds of the recomputed forward; a sliced MLP is unpacked once for both passes."""
        share = self.shape.mlp_weights / max(1, self.dense)
        if self.by_rows:  # what comes before the MLP is computed three times
            return self.forward() + 2 * (1 - share) * (self._product() + self.unpack)
        twice = 0.0
        if self.tiles > 1:  # operations before attention run once for q and once for k and v
            twice = 0.25 * (1 - self.shape.mlp_weights / self.shape.block_weights)
        return self.forward() - self.sliced * share * self.unpack + twice * self._product()

    def backward(self) -> float:
        """Seconds of the gradient alone, without the recomputed forward."""
        return self._product() + self.unpack + self._attention(5) + self._entrywise()

    def _product(self) -> float:
        dense, fused = self.dense / self.rates.flops, self.fused / self.rates.fused_flops
        return 2 * self.batch_shape.size * (dense + fused)

    def _attention(self, products: int) -> float:
        """Seconds of `products` products of tokens x tokens, of which causal masks drop half."""
        size = self.batch_shape.size * self.batch_shape.attended * self.shape.queries
        return products * size / self.rates.flops

    def _entrywise(self) -> float:
        shape = self.shape
        sizes = {
            "hidden": shape.hidden,
            "queries": shape.queries,
            "intermediate": shape.intermediate,
        }
        entries = sum(PASSES[name] * size for name, size in sizes.items())
        return self.batch_shape.size * entries * shape.itemsize / self.rates.moved
