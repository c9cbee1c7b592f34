"""Losses over a large vocabulary. They depend on MLX only, not on other parts of this package."""
