"""Peak memory of generating with a model and of merging an adapter, beside mlx-lm.

    python benchmarks/generate_and_fuse.py generate --shape llama-3.2-3b --memory-budget 500MB
    python benchmarks/generate_and_fuse.py fuse --shape llama-3.2-3b
    python benchmarks/generate_and_fuse.py generate --shape llama-3.3-70b --blocks 2 \\
        --memory-budget 2GB
    python benchmarks/generate_and_fuse.py plan --shape llama-3.3-70b --memory-budget 2GB

Random 4-bit checkpoints of real shapes, and a random adapter of rank 16 on every linear layer of
every block, are written once. Each row is a process of its own. `peak` is `mx.get_peak_memory`,
`process` the largest resident set (Linux) or footprint (macOS), interpreter and libraries included.
`generate` answers one prompt greedily; both rows must give the same tokens. `fuse` writes the
merged model and removes it. `plan` prints the expected peak of `generate` for a model that need
not be on the disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm import fuse as mlx_lm_fuse
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_edgelora.benchmark.meters import peak_footprint
from mlx_edgelora.benchmark.shapes import (
    SHAPES,
    add_tokenizer,
    checkpoint,
    default_cache,
    random_model,
)
from mlx_edgelora.config.kinds import BUDGET, read_value
from mlx_edgelora.export.fusing import fuse
from mlx_edgelora.inference.loading import generate, load
from mlx_edgelora.inference.streamed import plan_inference
from mlx_edgelora.measure.units import size
from mlx_edgelora.training.adapters import save_adapters

RANK = 16
ROWS = ("mlx_edgelora", "mlx_lm")


def adapter(cache: Path, shape: str, blocks: int, model: Path) -> Path:
    """A random adapter of a shape, written once."""
    folder = cache / f"{shape}-{blocks}-adapter"
    if (folder / "adapters.safetensors").exists():
        return folder
    made, _ = random_model(shape, blocks, "4bit")
    made.freeze()
    parameters = {"rank": RANK, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(made, blocks, parameters)
    shapes = {name: value.shape for name, value in tree_flatten(made.trainable_parameters())}
    del made
    weights = {name: 0.01 * mx.random.normal(shape) for name, shape in shapes.items()}
    config = {"fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": parameters}
    save_adapters(folder, weights, config | {"model": str(model)})
    return folder


def measured(args: argparse.Namespace, model: Path, adapted: Path) -> dict[str, object]:
    """Figures of one row, in this process."""
    start, result = time.perf_counter(), ""
    if args.command == "generate":
        prompt = list(range(1, args.prompt_tokens + 1))
        if args.row == "mlx_lm":
            loaded, tokenizer = mlx_lm.load(str(model), adapter_path=str(adapted))
            result = mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=args.max_tokens)
        else:
            tokens = args.prompt_tokens + args.max_tokens
            loaded, tokenizer = load(str(model), adapted, args.memory_budget, tokens)
            result = generate(loaded, tokenizer, prompt, max_tokens=args.max_tokens)
    else:
        target = args.cache / f"fused-by-{args.row}"
        shutil.rmtree(target, ignore_errors=True)
        if args.row == "mlx_lm":
            sys.argv = ["fuse", "--model", str(model), "--adapter-path", str(adapted)]
            sys.argv += ["--save-path", str(target)]
            mlx_lm_fuse.main()
        else:
            fuse(str(model), [adapted], target)
        shutil.rmtree(target)
    seconds = time.perf_counter() - start
    return {
        "peak": mx.get_peak_memory(),
        "process": peak_footprint(),
        "seconds": seconds,
        "result": result,
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["generate", "fuse", "plan"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=int, help="all of the model's if absent")
    parser.add_argument("--memory-budget", default="500MB")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of random models")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    blocks = args.blocks or SHAPES[args.shape][1]
    if args.command == "plan":
        model, _ = random_model(args.shape, blocks, "4bit")
        lazy = SimpleNamespace(model=model, vocabulary=SHAPES[args.shape][-1], blocks=None)
        budget = read_value("--memory-budget", args.memory_budget, BUDGET)
        tokens = args.prompt_tokens + args.max_tokens
        print(plan_inference(lazy, budget, 1, tokens).text(blocks))
        return
    model = checkpoint(args.cache, args.shape, blocks)
    add_tokenizer(model, SHAPES[args.shape][-1])
    adapted = adapter(args.cache, args.shape, blocks, model)
    if args.row:
        print(json.dumps(measured(args, model, adapted)))
        return
    print(f"{args.command}, {args.shape}, {blocks} blocks, budget {args.memory_budget}")
    print("| | peak | process | seconds |\n|---|---|---|---|")
    results = set()
    for row in args.rows:
        child = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        out = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        results.add(found["result"])
        figures = size(found["peak"]), size(found["process"]), f"{found['seconds']:.0f}"
        print(f"| {row} | {' | '.join(figures)} |", flush=True)
    print("the same answers" if len(results) == 1 else f"other answers: {results}")


if __name__ == "__main__":
    main()
