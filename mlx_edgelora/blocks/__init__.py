"""mlx-lm's decoder blocks: finding, checking, tiling and patching them."""
