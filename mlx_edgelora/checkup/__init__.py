"""The checks of `mlx_edgelora.doctor` and their report."""
