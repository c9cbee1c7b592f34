"""The sizes of a model and a batch that decide what a step takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of an adapted model, found by `planner/shape.py`; of blocks the largest one's.

    Attributes:
        blocks: how many there are.
        adapted: how many last ones a backward reaches.
        hidden: entries of a hidden state.
        queries: entries of a token's queries, over all heads.
        keys: entries of its keys and values together.
        intermediate: entries between the matrices of an MLP.
        vocabulary: rows of the head.
        rank: of the adapters, the largest.
        block_bytes: frozen weights of a block, as they are held.
        mlp_bytes: those of its MLP among them.
        block_weights: entries of a block's matrices.
        mlp_weights: those of its MLP among them.
        head_bytes: of embedding and head, as they are held.
        head_entries: entries of the head.
        packed: whether weights of blocks are quantized.
        head_packed: whether the head is.
        outside_bytes: frozen weights that always stay in memory.
        adapter_bytes: trained parameters of a block.
        mlp_adapter_bytes: those of its MLP among them.
        outside_adapter_bytes: trained parameters outside the blocks.
        itemsize: bytes of an entry of a hidden state.
        gated: whether every block's MLP can be computed in slices.
        blocked_heads: of queries, where MLX's fused gradient on Metal makes blocks of their scores;
            0 where attention is computed otherwise.
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


@dataclass(frozen=True)
class BatchShape:
    """A batch, as far as its cost goes.

    Attributes:
        rows: of the batch.
        tokens: of a row, padding included.
        labelled: tokens of the batch that carry a label.
        context: where rows share rows, tokens of the one that a token is in, averaged over
            tokens; 0 where they do not.
    """

    rows: int
    tokens: int
    labelled: int
    context: int = 0

    @property
    def size(self) -> int:
        """All tokens."""
        return self.rows * self.tokens

    @property
    def attended(self) -> int:
        """Tokens of what a token may attend to, half of which it sees on average."""
        return min(self.context or self.tokens, self.tokens)

    def part(self, count: int) -> "BatchShape":
        """The largest of so many parts of the rows."""
        rows = -(-self.rows // min(count, self.rows))
        labelled = min(self.labelled, -(-self.labelled * rows // self.rows))
        return BatchShape(rows, self.tokens, labelled, self.context)
