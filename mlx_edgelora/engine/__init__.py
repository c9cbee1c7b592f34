"""The walk over segments of blocks, one training step, and the state of the adapters."""
