"""The sizes of a model and a batch that decide the memory and time of a step."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


class BlockBytes(NamedTuple):
    """Bytes of one block in memory.

    Attributes:
        frozen: its frozen weights.
        experts: the part of `frozen` in experts that can be read in groups.
        trained: its trained parameters.
    """

    frozen: int
    experts: int
    trained: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of an adapted model, found by `planner/shape.py`.

    Sizes of a block are those of the largest block, except in `by_block`; `queries` and `keys` may
    be of two blocks.

    Attributes:
        blocks: number of blocks.
        adapted: number of last blocks that the backward reaches.
        hidden: entries of a hidden state.
        queries: entries of a token's queries, over all heads.
        keys: entries of a token's keys and values together.
        intermediate: intermediate size of an MLP.
        vocabulary: rows of the head.
        rank: largest rank of the adapters.
        block_bytes: bytes of the frozen weights of a block in memory.
        mlp_bytes: the part of `block_bytes` in the MLP.
        block_weights: entries of the matrices of a block.
        mlp_weights: the part of `block_weights` in the MLP.
        head_bytes: bytes of the embedding and the head in memory.
        head_entries: entries of the head.
        packed: whether the weights of blocks are quantized.
        head_packed: whether the head is quantized.
        outside_bytes: bytes of frozen weights that always stay in memory.
        adapter_bytes: bytes of the trained parameters of a block.
        mlp_adapter_bytes: the part of `adapter_bytes` in the MLP.
        outside_adapter_bytes: bytes of trained parameters outside the blocks.
        itemsize: bytes of an entry of a hidden state.
        gated: whether the MLP of every block can be computed in slices, or in groups of experts.
        blocked_heads: number of query heads for which MLX's fused gradient on Metal computes
            blocks of scores; 0 if attention is computed in another way.
        arguments: entries of a token's other inputs of all blocks, which stay in memory.
        shared: entries of a token that blocks return for later ones, such as keys and values.
        expert_bytes: the part of `block_bytes` in experts that can be read in groups.
        one_expert_bytes: the part of `expert_bytes` of a single expert.
        row_bytes: the part of `block_bytes` in a gated MLP that can be read by rows; 0 if none can.
        full: whether the last `adapted` blocks have no adapters, but train their own weights.
        accumulates: whether gradients of several batches are added up before an update.
        expert_adapter_bytes: the part of `adapter_bytes` in these experts.
        state_bytes: bytes of the states of a recurrent block after a tile, for a row; 0 if there
            are no such blocks.
        recurrent: outputs of the widest matrix of a recurrent block, MLPs left out.
        recurrent_attends: whether such a block has keys and values as well.
        routed: outputs of the matrices of experts of a token, for all experts that it picks.
        expanded: entries of a token's keys and values that are made again from a smaller array in
            the cache; 0 if the cache has them all.
        by_block: bytes of every block, if they differ; empty if all are like the largest one.
    """

    blocks: int
    adapted: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int
    rank: int
    block_bytes: int
    mlp_bytes: int
    block_weights: int
    mlp_weights: int
    head_bytes: int
    head_entries: int
    packed: bool
    head_packed: bool
    outside_bytes: int
    adapter_bytes: int
    mlp_adapter_bytes: int
    outside_adapter_bytes: int
    itemsize: int
    gated: bool
    blocked_heads: int = 0
    arguments: int = 0
    shared: int = 0
    expert_bytes: int = 0
    one_expert_bytes: int = 0
    state_bytes: int = 0
    recurrent: int = 0
    recurrent_attends: bool = False
    routed: int = 0
    expanded: int = 0
    expert_adapter_bytes: int = 0
    row_bytes: int = 0
    full: bool = False
    accumulates: bool = False
    by_block: tuple[BlockBytes, ...] = ()

    @property
    def frozen_blocks(self) -> int:
        """Number of first blocks that have frozen weights."""
        return self.blocks - self.adapted if self.full else self.blocks

    def frozen_bytes(self, start: int, stop: int) -> int:
        """Bytes of the frozen weights of blocks `start` to `stop - 1`."""
        return self._between("frozen", self.block_bytes, start, stop)

    def trained_bytes(self, start: int, stop: int) -> int:
        """Bytes of the trained parameters of blocks `start` to `stop - 1`."""
        return self._between("trained", self.adapter_bytes, start, stop)

    def read_bytes(self, grouped: bool) -> int:
        """Bytes that are read at once of the largest block.

        Args:
            grouped: whether experts are read in groups, into other memory.
        """
        if not self.by_block:
            return self.block_bytes - grouped * self.expert_bytes
        return max(block.frozen - grouped * block.experts for block in self.by_block)

    def _between(self, name: str, largest: int, start: int, stop: int) -> int:
        if stop <= start:
            return 0
        if not self.by_block:
            return (stop - start) * largest
        sums = self._sums[name]
        return sums[stop] - sums[start]

    @cached_property
    def _sums(self) -> dict[str, list[int]]:
        """Bytes of the blocks below each one."""
        names = BlockBytes._fields
        columns = zip(*self.by_block, strict=True)
        return {n: [0, *accumulate(found)] for n, found in zip(names, columns, strict=True)}


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch that decide its cost.

    Attributes:
        rows: number of rows.
        tokens: tokens of a row, including padding.
        labelled: number of tokens in the batch that have a label.
        context: for packed rows, length of the example that a token belongs to, averaged over
            tokens; 0 without packing.
        together: rows that are computed in the same part of a batch: 2 in batches of pairs. It
            changes no measurement.
    """

    rows: int
    tokens: int
    labelled: int
    context: int = 0
    together: int = field(default=1, compare=False)

    @property
    def most_parts(self) -> int:
        """Largest number of parts in which a batch can be computed."""
        return max(1, self.rows // self.together)

    @property
    def size(self) -> int:
        """Number of tokens in the batch."""
        return self.rows * self.tokens

    @property
    def attended(self) -> int:
        """Length of the context of a token; a causal mask shows half of it on average."""
        return min(self.context or self.tokens, self.tokens)

    def sizes(self) -> dict[str, int]:
        """What decides its cost, by name, for files and reports."""
        names = ("rows", "tokens", "labelled", "context")
        return {name: getattr(self, name) for name in names}

    def part(self, count: int) -> "BatchShape":
        """The largest part of the batch if its rows are divided into `count` parts."""
        rows = self.together * -(-self.most_parts // min(count, self.most_parts))
        labelled = min(self.labelled, -(-self.labelled * rows // self.rows))
        return BatchShape(rows, self.tokens, labelled, self.context)
