"""Losses over a large vocabulary; they import MLX and nothing of ours."""
