"""What `mlx_edgelora.doctor` looks at, and the report it makes of it."""
