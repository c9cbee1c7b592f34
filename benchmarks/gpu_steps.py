"""Peak and seconds of a step within some budgets, beside mlx-lm's: the table of a GPU.

    python benchmarks/gpu_steps.py --output out
    python benchmarks/gpu_steps.py --shape small --blocks 4 --tokens 64 --budgets plenty min

Each row is a process of its own, which is ended after `--seconds`; a row that fails costs its own
figures alone. The table is written after every row, with every step's seconds in `steps.jsonl`.
Shape, tokens, rank and rows are the same for everybody, and the start matrices. Ratios are of
medians; a GPU that nobody else uses is steady enough for that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edgelora.benchmark import contenders, rows, shapes
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.benchmark.machine import commit
from mlx_edgelora.benchmark.run import write_start
from mlx_edgelora.model.loading import open_model

RIVALS = ("mlx-lm", "mlx-lm, checkpointing")
RANK = 8


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one contender, in this process."""
    folder = shapes.checkpoint(args.cache, args.shape, args.blocks, args.weights)
    shapes.add_tokenizer(folder, shapes.SHAPES[args.shape][-1])
    work = Path(tempfile.mkdtemp(prefix="edgelora-"))
    (work / "data").mkdir()
    made = rows.synthetic_rows(
        rows.tokenizer_of(folder), 2, args.tokens, 0.3, rows.words_for(folder)
    )
    masked = rows.write_rows(work / "data", made)
    start = work / "start.safetensors"
    opened = open_model(str(folder), streamed=False, quantize=None, cache=args.cache)
    write_start(opened, RANK, start)
    ours, options = args.row not in RIVALS, {}
    if ours:
        words = {"plenty": contenders.PLENTY, "min": "min"}
        budget = words.get(args.row) or round(float(args.row) * 1e9)
        options = {"memory_budget": budget, "spill_dir": str(work)}
    job = TrainingJob(
        model=str(folder),
        data=str(work / "data"),
        start=str(start),
        context=args.tokens,
        batch=1,
        steps=args.steps,
        rank=RANK,
        scale=20.0,
        learning_rate=1e-4,
        mask_prompt=masked,
        last=args.steps,
        output=str(work),
        checkpointing=args.row == RIVALS[1],
        options=options,
    )
    del opened
    mx.clear_cache()
    mx.reset_peak_memory()
    times, losses, last = [], [], time.perf_counter()

    def pause(loss: float, trained: dict | None = None, disk: object = None) -> None:
        nonlocal last
        if trained is not None:
            mx.eval(list(trained.values()))
        mx.synchronize()
        times.append(time.perf_counter() - last)
        losses.append(loss)
        last = time.perf_counter()

    (contenders.mlx_edgelora if ours else contenders.mlx_lm)(job, pause)
    return {
        "row": args.row,
        "tokens": args.tokens,
        "peak_mb": mx.get_peak_memory() / 1e6,
        "first_s": times[0],
        "median_s": statistics.median(times[2:] or times),
        "times": times,
        "losses": losses,
    }


def table(found: list[dict[str, Any]], tokens: int, device: str) -> str:
    """What was measured so far."""
    by_row = {one["row"]: one for one in found}
    lines = [f"{device}, commit {commit()}, {tokens} tokens, 30 % labelled, rank {RANK}", ""]
    lines += ["| row | peak MB | s a step | first s | over mlx-lm | over checkpointing | loss |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for one in found:
        ratios = [
            f"{one['median_s'] / by_row[rival]['median_s']:.2f}" if rival in by_row else "-"
            for rival in RIVALS
        ]
        losses = f"{one['losses'][0]:.4f} to {one['losses'][-1]:.4f}"
        budget = "" if one["row"] in (*RIVALS, "plenty", "min") else " GB"
        lines.append(
            f"| {one['row']}{budget} | {one['peak_mb']:.0f} | {one['median_s']:.3f} | "
            f"{one['first_s']:.1f} | {ratios[0]} | {ratios[1]} | {losses} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every row in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-3.2-3b")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--weights", choices=shapes.WEIGHTS, default="4bit")
    parser.add_argument(
        "--budgets", nargs="+", default=["plenty", "3.7", "1.9", "1.0", "0.5", "min"], metavar="GB"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=60, help="of a row at most")
    parser.add_argument("--cache", type=Path, default=shapes.default_cache())
    parser.add_argument("--output", type=Path, default=Path("gpu-steps"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.row:
        print("RESULT " + json.dumps(measure(args)))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    device = str(mx.device_info().get("device_name", mx.default_device()))
    for row in (*RIVALS, *args.budgets):
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        log = args.output / f"{args.tokens}-{row.replace(' ', '')}.log"
        with log.open("w") as file:
            try:
                subprocess.run(command, stdout=file, stderr=file, timeout=args.seconds, check=False)
            except subprocess.TimeoutExpired:
                file.write(f"\nended after {args.seconds} s\n")
        results = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
        if not results:
            print(f"{row}: nothing measured, see {log}", flush=True)
            continue
        found.append(json.loads(results[0].removeprefix("RESULT ")))
        with (args.output / "steps.jsonl").open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        (args.output / f"{args.tokens}.md").write_text(table(found, args.tokens, device))
    print(table(found, args.tokens, device))


if __name__ == "__main__":
    main()
