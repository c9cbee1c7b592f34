"""Losses over a large vocabulary. They use MLX and NumPy, but no other part of this package."""
