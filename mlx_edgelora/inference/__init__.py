"""Using a model with its adapter within a memory budget; mlx-lm does the sampling."""
