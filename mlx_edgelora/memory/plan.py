"""What a run keeps, spills, streams and tiles: one frozen record, which the engine obeys."""

from dataclasses import dataclass

from mlx_edgelora.config import TrainConfig

MIB = 2**20

# Without a budget, batches of more tokens are computed by tiles of so many.
TILE_TOKENS = 4096
# The tokens of a tile of the floor: fewer save little more, for what is dequantized per tile.
FLOOR_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """The choices of a run that trade memory for time.

    Attributes:
        weights: "streamed" or "resident", of frozen weights.
        prefetch: read the next block's weights while one is computed.
        activations: "spill" or "ram", of the blocks' inputs.
        adapters: "paged" or "resident", of what is trained and the optimizer's state.
        tile_tokens: blocks are computed for so many tokens at a time where a batch has
            more; None for all at once.
        halves: with tiles, keep what lies between attention and MLP of a block as well, and
            bind one half's weights at a time.
        mlp_bytes: a slice of a gated MLP; None computes it layer by layer.
        loss_bytes: a tile of the vocabulary head.
        cache_bytes: what MLX may keep of freed buffers: enough for one block's to be used
            again, where its own default on Metal keeps nearly everything it ever had.
        reason: why these.
    """

    weights: str = "streamed"
    prefetch: bool = True
    activations: str = "spill"
    adapters: str = "resident"
    tile_tokens: int | None = TILE_TOKENS
    halves: bool = False
    mlp_bytes: int | None = 16 * MIB
    loss_bytes: int = 40 * MIB
    cache_bytes: int = 64 * MIB
    reason: str = "no memory budget was named"

    @classmethod
    def floor(cls) -> "Plan":
        """The least memory that this package can train in."""
        return cls(
            prefetch=False,
            adapters="paged",
            tile_tokens=FLOOR_TOKENS,
            halves=True,
            mlp_bytes=4 * MIB,
            loss_bytes=16 * MIB,
            cache_bytes=16 * MIB,
            reason="the least memory, as asked",
        )

    def __str__(self) -> str:
        tiles = "all tokens at once" if self.tile_tokens is None else f"{self.tile_tokens} tokens"
        return (
            f"weights {self.weights}{', the next block read ahead' * self.prefetch}; adapters "
            f"{self.adapters}; tiles of {tiles}{', blocks in halves' * self.halves} "
            f"({self.reason})"
        )


def plan_for(config: TrainConfig) -> Plan:
    """The plan of a run: the floor where it is asked for, else what its options say."""
    if config.memory_budget == "min":
        return Plan.floor()
    return Plan(
        weights=config.weights,
        activations=config.activations,
        adapters=config.adapters or "resident",
        # Whoever asks for MLX's kernel has it multiply in the MLP as well.
        mlp_bytes=None if config.kernel == "fused" else Plan.mlp_bytes,
    )
