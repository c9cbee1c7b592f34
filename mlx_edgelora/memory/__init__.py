"""Activation stores, block checkpointing, and what a run costs."""
