"""Layers with their own exact gradients; each is usable alone."""
