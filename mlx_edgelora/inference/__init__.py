"""Generate with a model and its adapter within a memory budget; mlx-lm does the sampling."""
