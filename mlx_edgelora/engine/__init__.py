"""The walk over segments of blocks: what is recorded, computed, kept and differentiated."""
