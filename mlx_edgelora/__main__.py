"""`python -m mlx_edgelora` lists the commands."""

print("Commands:\n  python -m mlx_edgelora.train   fine-tune a model (--help lists the options)")
