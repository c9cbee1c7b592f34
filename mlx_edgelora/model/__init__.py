"""Checkpoints, loading, LoRA layers, weight sources and the vocabulary head."""
