"""Peak memory of one training step against the number of blocks, on synthetic weights.

    python benchmarks/depth.py --shape small --blocks 4 16 --tokens 256
    python benchmarks/depth.py --shape llama-3.2-3b --blocks 2 4 --tokens 512

Every row is a process of its own that writes a 4-bit checkpoint of the shape, makes two
steps (LoRA on all linear layers, AdamW, batch 1, float32, every token labelled) and
prints the second one: MLX allocator peak, process footprint, bytes read and written.
`plain` is `mlx.nn.value_and_grad` over the resident model, with the same kernels;
`blockwise` is this package with streamed weights and spilled activations.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_edgelora.data import Batch
from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.measure.meter import DiskMeter, footprint
from mlx_edgelora.model.checkpoint import write_model
from mlx_edgelora.model.loading import attach, open_model
from mlx_edgelora.model.lora import add_lora, set_kernel
from mlx_edgelora.storage.stores import MappedStore

MIB = 2**20
COMMON = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def write_checkpoint(folder: Path, shape: str, blocks: int) -> None:
    """Write random 4-bit weights of a shape, one tensor at a time."""
    config = COMMON | SHAPES[shape] | {"num_hidden_layers": blocks}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(model, 64, 4)
    parameters = tree_flatten(model.parameters())
    del model
    write_model(folder, parameters, config | {"quantization": {"group_size": 64, "bits": 4}})


def measure(mode: str, shape: str, blocks: int, tokens: int, rank: int) -> dict[str, float]:
    """Make two steps and measure the second."""
    mx.set_cache_limit(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, shape, blocks)
        streamed, meter = mode == "blockwise", DiskMeter()
        lazy = open_model(str(folder), streamed=streamed, quantize=None, cache=folder)
        add_lora(lazy.model, -1, rank=rank)
        set_kernel(lazy.model, "dequantize")
        attached = attach(lazy, streamed=streamed, dtype=None, meter=meter)
        lazy.model.train()
        vocabulary = SHAPES[shape]["vocab_size"]
        row = np.random.RandomState(0).randint(0, vocabulary, (1, tokens + 1)).astype(np.int32)
        batch = Batch(row, np.ones((1, tokens), bool), (0,))
        optimizer = optimizers.AdamW(1e-4)
        store = MappedStore(folder, meter)
        walk = Walk(lazy.model, store, attached.weights)
        trained = ResidentAdapterState(lazy.model)
        trained.start(optimizer)
        engine = Engine(lazy.model, walk, attached.head, meter, trained=trained)
        step = engine.backward if streamed else plain(lazy.model)
        for _ in range(2):
            mx.reset_peak_memory()
            before, start = meter.snapshot(), time.perf_counter()
            step(batch, trained.add)
            trained.update(optimizer, 1)
        after = meter.snapshot()
        engine.close()
    adapters = sum(value.nbytes for value in trained.weights().values())
    return {
        "mode": mode,
        "blocks": blocks,
        "tokens": tokens,
        "peak": mx.get_peak_memory() / MIB,
        "footprint": footprint() / MIB,
        "adapters": adapters / MIB,
        "read": (after.read_bytes - before.read_bytes) / MIB,
        "written": (after.written_bytes - before.written_bytes) / MIB,
        "seconds": time.perf_counter() - start,
    }


def plain(model: nn.Module):  # noqa: ANN201 - a function as Engine.backward
    """MLX's own autodiff over the whole model."""

    def loss(inputs: mx.array, labels: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(inputs), labels, reduction="mean")

    gradient = nn.value_and_grad(model, loss)

    def run(batch: Batch, sink: Callable[[dict[str, mx.array]], None]) -> None:
        value, gradients = gradient(mx.array(batch.inputs()), mx.array(batch.labels()))
        mx.eval(value, gradients)
        sink(dict(tree_flatten(gradients)))

    return run


def main() -> None:
    """Measure every combination in a process of its own and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modes", nargs="+", default=["plain", "blockwise"])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        row = measure(args.modes[0], args.shape, args.blocks[0], args.tokens, args.rank)
        print(json.dumps(row))
        return
    print(f"{args.shape}, {args.tokens} tokens, rank {args.rank}, float32; MiB")
    print("| mode | blocks | peak | footprint after | adapters | read | written |")
    print("|---|---|---|---|---|---|---|")
    for mode in args.modes:
        for blocks in args.blocks:
            child = [sys.executable, __file__, "--one", "--shape", args.shape, "--modes", mode]
            child += ["--blocks", str(blocks), "--tokens", str(args.tokens)]
            child += ["--rank", str(args.rank)]
            out = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            cells = [f"{row[key]:.1f}" for key in ("peak", "footprint", "adapters")]
            cells += [f"{row[key]:.1f}" for key in ("read", "written")]
            print(f"| {mode} | {blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
