"""How long a step takes by a plan: operations and bytes over measured rates."""

from mlx_edgelora.planner.cost import FLOAT, Load, Memory
from mlx_edgelora.planner.machine import Machine
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.sizes import ModelShape

# Small operations of a block, forward and backward, and of one more tile of it.
BLOCK_CALLS, TILE_CALLS = 600, 400
# Arrays that operations entry by entry read and write, in a forward and in a backward.
PASSES = {"hidden": 12, "queries": 8, "intermediate": 8}
# What is read ahead, or written behind, still takes this share of its time.
OVERLAPPED = 0.4


def seconds(shape: ModelShape, load: Load, plan: Plan, machine: Machine) -> float:
    """Seconds of a whole step: forward, loss, backward and update."""
    part = load.part(plan.micro_batches)
    step = _Step(shape, part, plan, machine)
    return min(plan.micro_batches, load.rows) * step.batch() + step.update()


class _Step:
    def __init__(self, shape: ModelShape, load: Load, plan: Plan, machine: Machine) -> None:
        self.shape, self.load, self.plan = shape, load, plan
        self.rates = machine.rates
        self.memory = Memory(shape, load, plan)
        self.tiles = 1
        if self.memory.by_tiles:
            self.tiles = -(-load.size // plan.tile_tokens)
        self.sliced = plan.mlp_bytes is not None and shape.gated
        kernel = machine.kernels[0] if plan.kernel == "auto" else plan.kernel
        # Entries of a block that MLX's kernel multiplies as they are; slices are unpacked.
        self.fused = 0
        if shape.packed and kernel == "fused":
            self.fused = shape.block_weights - (shape.mlp_weights if self.sliced else 0)
        self.dense = shape.block_weights - self.fused
        # Seconds that unpacking the others takes in one pass over all tokens, and the MLP's share.
        self.unpack = 0.0
        if shape.packed:
            self.unpack = self.tiles * self.dense / self.rates.dequantized
        self.unpack_mlp = self.unpack * shape.mlp_weights / max(1, self.dense)

    def batch(self) -> float:
        """Forward, loss and backward of a batch, or of one part of it."""
        shape, plan, memory = self.shape, self.plan, self.memory
        every = shape.blocks
        last = self._tokens(every - 1) / self.load.size
        # As many whole blocks: the last one is computed for labelled tokens.
        forward = (every - 1 + last) * self._forward()
        adapted = shape.adapted - 1 + last
        kept = memory.kept - 1 + last if memory.kept else 0
        backward = adapted * self._backward() + (adapted - kept) * self._again()
        read = self._disk(shape.block_bytes * self._visits(), self.rates.read, plan.prefetch)
        calls = (BLOCK_CALLS + TILE_CALLS * (self.tiles - 1)) * self.rates.call
        return forward + backward + read + self._spill() + self._head() + every * calls

    def update(self) -> float:
        """The optimizer, and what is trained on its way to a file and back."""
        size = self.shape.adapted * self.shape.adapter_bytes
        spent = 10 * size / self.rates.moved
        if self.plan.adapters == "paged":
            spent += 6 * size / self.rates.read + 4 * size / self.rates.written
        return spent

    def _tokens(self, index: int) -> int:
        return self.load.labelled if index + 1 == self.shape.blocks else self.load.size

    def _product(self) -> float:
        dense, fused = self.dense / self.rates.flops, self.fused / self.rates.fused_flops
        return 2 * self.load.size * (dense + fused)

    def _attention(self, products: int) -> float:
        """So many products of tokens x tokens, half of each causal."""
        size = self.load.size * self.load.tokens * self.shape.queries
        return products * size / self.rates.flops

    def _entrywise(self) -> float:
        shape = self.shape
        sizes = {
            "hidden": shape.hidden,
            "queries": shape.queries,
            "intermediate": shape.intermediate,
        }
        entries = sum(PASSES[name] * size for name, size in sizes.items())
        return self.load.size * entries * shape.itemsize / self.rates.moved

    def _forward(self) -> float:
        return self._product() + self.unpack + self._attention(2) + self._entrywise()

    def _again(self) -> float:
        """The forward in the backward; a sliced MLP is unpacked once for both."""
        shared = self.unpack_mlp if self.sliced else 0.0
        twice = 0.0
        if self.memory.by_tiles:  # what lies before attention is computed for q, and for k and v
            twice = 0.25 * (1 - self.shape.mlp_weights / self.shape.block_weights)
        return self._forward() - shared + twice * self._product()

    def _backward(self) -> float:
        return self._product() + self.unpack + self._attention(5) + self._entrywise()

    def _visits(self) -> float:
        """How often blocks are read: streamed ones forward and backward."""
        streamed, first = self.memory.streamed, self.memory.first
        kept_from = self.shape.blocks - self.memory.kept
        again = max(0, min(streamed, kept_from) - first)
        return streamed + again

    def _spill(self) -> float:
        memory = self.memory
        count = self.shape.blocks - memory.kept - memory.first
        size = self.plan.spills * count * memory.hidden
        if memory.by_tiles:  # gradients go through the file, too
            size = self.plan.spills * self.shape.blocks * memory.hidden * 3
        spent = self._disk(size, self.rates.written, True)
        return spent + self._disk(size, self.rates.read, not memory.by_tiles)

    def _head(self) -> float:
        shape = self.shape
        entries = self.load.labelled * shape.vocabulary
        spent = 4 * entries * shape.hidden / self.rates.flops
        if shape.head_packed:
            spent += shape.head_entries / self.rates.dequantized
        spent += 6 * FLOAT * entries / self.rates.moved
        if self.plan.head == "streamed" and self.plan.streams:
            spent += shape.head_bytes / self.rates.read
        tiles = max(1, 16 * shape.head_entries // max(1, self.plan.loss_bytes))
        return spent + 60 * tiles * self.rates.call

    @staticmethod
    def _disk(size: float, rate: float, overlapped: bool) -> float:
        return (OVERLAPPED if overlapped else 1.0) * size / rate
