"""Fine-tune the embedded model from Python, watch the loss, and generate with the result.

python examples/finetune.py
"""

import mlx_lm

from mlx_edgelora import TrainConfig, TrainingCallback, finetune
from mlx_edgelora.embedded import DEFAULT_CONFIG, MODEL_PATH, answer


class Watch(TrainingCallback):
    """Prints what mlx-lm's callbacks get."""

    def on_train_loss_report(self, train_info: dict) -> None:
        """Called every `steps_per_report` steps."""
        print(f"  step {train_info['iteration']}: {train_info['train_loss']:.3f}")


config = TrainConfig.from_yaml(DEFAULT_CONFIG)  # or TrainConfig(model="...", data="...", ...)
result = finetune(config, callbacks=[Watch()])
model, tokenizer = mlx_lm.load(str(MODEL_PATH), adapter_path=str(result.adapter_path))
print(answer(model, tokenizer, "Mina was in Paris and sold 45 nuts on Saturday.", max_tokens=32))
