"""`python -m mlx_edgelora.benchmark`: this package beside mlx-lm, each in a process of its own."""
