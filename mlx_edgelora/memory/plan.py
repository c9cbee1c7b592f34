"""What a run keeps, spills, streams and tiles: one frozen record, which the engine obeys."""

from dataclasses import dataclass

MIB = 2**20

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
        tile_tokens: blocks are computed for so many tokens at a time; None for all.
        halves: with tiles, keep what lies between attention and MLP of a block as well, and
            bind one half's weights at a time.
        mlp_bytes: a slice of a gated MLP; None computes it layer by layer.
        loss_bytes: a tile of the vocabulary head.
        reason: why these.
    """

    weights: str = "streamed"
    prefetch: bool = True
    activations: str = "spill"
    adapters: str = "resident"
    tile_tokens: int | None = None
    halves: bool = False
    mlp_bytes: int | None = 16 * MIB
    loss_bytes: int = 40 * MIB
    reason: str = "no memory budget was named"

    @classmethod
    def floor(cls) -> "Plan":
        """The least memory that this package can train in."""
        return cls(
            prefetch=False,
            adapters="paged",
            tile_tokens=FLOOR_TOKENS,
            halves=True,
            mlp_bytes=8 * MIB,
            loss_bytes=16 * MIB,
            reason="the least memory, as asked",
        )
