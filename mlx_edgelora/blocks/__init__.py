"""What mlx-lm's blocks are, and what they can be made to do."""
