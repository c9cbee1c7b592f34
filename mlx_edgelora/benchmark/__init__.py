"""Compare this package with mlx-lm, in separate processes: `python -m mlx_edgelora.benchmark`."""
