"""Published peaks for comparison, from arXiv 2606.19528.

The paper does not say whether GB is decimal or binary; numbers are copied as they are. They are
peaks of one forward and backward pass on an A100 with 80 GB: batch 1, float32 arithmetic, 4-bit
base weights, rank 16, an approximate softmax over the 1000 nearest tokens, and 30 % of the tokens
trained. None means out of memory.
"""

CONTEXTS = (1024, 2048, 4096, 8192, 16384)
ROWS = (
    "LoRA, float32",
    "+ quantization",
    "+ checkpointing",
    "+ softmax approximation",
    "+ logits masking",
)
_GB: dict[str, tuple[tuple[float | None, ...], ...]] = {
    "llama-3.2-3b": (
        (19.10, 26.20, 40.41, 68.83, None),
        (8.80, 14.68, 27.48, 53.07, None),
        (2.37, 3.33, 6.29, 12.21, 24.05),
        (1.30, 2.43, 5.41, 11.58, 23.79),
        (0.70, 1.02, 1.59, 3.24, 6.95),
    ),
    "qwen2.5-3b": (
        (21.68, 30.51, 48.38, None, None),
        (11.21, 19.46, 36.03, 69.17, None),
        (2.06, 3.79, 7.29, 14.27, 28.24),
        (1.26, 3.03, 6.58, 13.79, 27.98),
        (0.66, 1.01, 1.71, 3.90, 8.34),
    ),
}


def published(shape: str | None, row: str) -> dict[int, float | None]:
    """GB by context for a row of the table and the whole model; empty for other shapes."""
    if shape not in _GB or row not in ROWS:
        return {}
    return dict(zip(CONTEXTS, _GB[shape][ROWS.index(row)], strict=True))
