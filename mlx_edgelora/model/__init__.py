"""Loading, LoRA injection, weight sources, and what a block is."""
