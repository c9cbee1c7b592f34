"""Use the walk alone: a drop-in for `nn.value_and_grad` in a training loop of your own.

python examples/own_loop.py
"""

import contextlib

import mlx.core as mx
import mlx.optimizers as optimizers
import mlx_lm
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_edgelora import MappedStore, value_and_grad
from mlx_edgelora.embedded import MODEL_PATH

model, tokenizer = mlx_lm.load(str(MODEL_PATH))
model.freeze()
linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 10.0, "dropout": 0.0})
model.train()
optimizer = optimizers.AdamW(1e-3)
tokens = mx.array([tokenizer.encode("Mira lives in Porto and has seven apples.")])
lengths = mx.array([[0, tokens.shape[1] - 1]])

with contextlib.closing(MappedStore(".")) as store:
    # nn.value_and_grad(model, default_loss) gives the same, at a peak that grows with depth.
    gradient = value_and_grad(model, default_loss, store=store)
    for step in range(10):
        (loss, _), gradients = gradient(model, tokens, lengths)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        print(f"step {step}: {loss.item():.3f}")
