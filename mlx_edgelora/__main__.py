"""`python -m mlx_edgelora` lists the commands."""

COMMANDS = {
    "train": "fine-tune a model",
    "plan": "tell whether a run fits into memory, and how",
    "verify": "compare a run's gradients with those of plain MLX",
    "benchmark": "compare memory and time with mlx-lm",
    "doctor": "measure what this machine can do, for a report",
}

print("Commands (--help lists the options of each):")
for name, text in COMMANDS.items():
    print(f"  python -m mlx_edgelora.{name:<10}  {text}")
