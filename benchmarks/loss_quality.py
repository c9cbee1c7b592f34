"""What the losses leave of the quality of a fine-tuned model: the embedded task, several seeds.

`loss.py quality` runs it. It fine-tunes the model inside the package as
`python -m mlx_edgelora.train` does (data, adapters, optimizer and learning rate of
`assets/default.yaml`), once per seed: with mlx-lm's own trainer and loss, with these on this
package's batches, with the exact loss and with the approximate one. Adapters
are judged after each of `--steps` steps of one run (the learning rate is constant, so a shorter run
ends there too). It takes 20 minutes on two free cores.

One judge for all: mlx-lm loads the adapter and answers the held-out prompts, and the exact loss
is that of MLX's own cross-entropy on the tokens of the held-out answers, one row at a time,
without padding. The table gives the mean over the seeds and the range in brackets.
"""

import argparse
import contextlib
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm import lora
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import default_loss

from mlx_edgelora import TrainConfig, finetune
from mlx_edgelora.config.yaml_file import read_yaml
from mlx_edgelora.data.batches import iterate_batches
from mlx_edgelora.embedded import (
    DATA_PATH,
    DEFAULT_CONFIG,
    MAX_TOKENS,
    MODEL_PATH,
    exact_match,
    held_out_rows,
)

VOCABULARY = 853


@dataclass(frozen=True)
class Arm:
    """A way to train: its name in the table, and options of ours; None for mlx-lm.

    `mended` gives mlx-lm's trainer our batches and a mask without padding.
    """

    name: str
    options: dict | None = None
    mended: bool = False


def unpadded_loss(model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple:
    """mlx-lm's `default_loss` without the one position of padding that it trains in each row."""
    return default_loss(model, batch, lengths - mx.array([0, 1]))


def our_batches(order: int, dataset: CacheDataset, **options: object) -> Iterator[tuple]:
    """Batches of this package with a seed for their order, in mlx-lm's form."""
    options |= {"seed": order}
    options.pop("comm_group")
    for batch in iterate_batches(dataset, **options):
        # Rows have one labelled span each, which ends with them.
        first = 1 + batch.mask.argmax(axis=1)
        yield mx.array(batch.tokens), mx.array(np.stack([first, first + batch.mask.sum(axis=1)], 1))


def arms() -> list[Arm]:
    """All rows of the table, in order."""
    result = [
        Arm("mlx-lm's trainer and loss"),
        Arm("mlx-lm's, our batches, no padding", mended=True),
        Arm("exact", {}),
    ]
    for corrected, ks in ((True, (10, 30, 100, 300, VOCABULARY)), (False, (10, 100))):
        for k in ks:
            name = f"approximate, k = {k}, {'with' if corrected else 'no'} tail correction"
            options = {"loss": "approximate", "loss_k": k, "loss_tail_correction": corrected}
            result.append(Arm(name, options))
    return result


def train(arm: Arm, seed: int, steps: list[int], folder: Path) -> None:
    """Train one arm; `folder` gets the adapter after each of some steps."""
    run = {
        "seed": seed,
        "iters": max(steps),
        "save_every": math.gcd(*steps),
        "steps_per_eval": max(steps),
        "adapter_path": str(folder),
    }
    shared = read_yaml(DEFAULT_CONFIG) | run
    if arm.options is None:
        more = {"model": str(MODEL_PATH), "data": str(DATA_PATH), "train": True}
        mended = {"loss": unpadded_loss, "iterate_batches": partial(our_batches, seed)}
        trainer = partial(lora.train, **mended) if arm.mended else lora.train
        with mock.patch.object(lora, "train", trainer):
            lora.run(SimpleNamespace(**(lora.CONFIG_DEFAULTS | shared | more)))
    else:
        options = {"val_batches": 0, "cache_dir": str(folder / "cache")} | arm.options
        finetune(TrainConfig.from_dict(shared | options))


def judge(folder: Path, step: int, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Exact match and exact loss of held-out rows with the adapter after a step."""
    shutil.copyfile(folder / f"{step:07d}_adapters.safetensors", folder / "adapters.safetensors")
    model, tokenizer = mlx_lm.load(str(MODEL_PATH), adapter_path=str(folder))
    total, count = 0.0, 0
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        messages = [*asked, {"role": "assistant", "content": row["completion"]}]
        tokens = tokenizer.apply_chat_template(messages)
        start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True))
        logits = model(mx.array([tokens[:-1]]))[0, start - 1 :].astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(tokens[start:]), reduction="sum")
        total, count = total + losses.item(), count + len(tokens) - start
    return exact_match(model, tokenizer, rows, MAX_TOKENS), total / count


def quality(args: argparse.Namespace) -> None:
    """Train every arm with every seed, and print the table."""
    rows = held_out_rows(args.rows)
    heads = [f"match at {n} | loss at {n}" for n in args.steps]
    print(
        f"| loss trained with | {' | '.join(heads)} |\n|---|{'---|' * 2 * len(heads)}", flush=True
    )
    for arm in arms():
        found = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null):
                    train(arm, seed, args.steps, Path(folder))
                found.append([judge(Path(folder), step, rows) for step in args.steps])
        cells = []
        for at_step in zip(*found, strict=True):
            matches, losses = zip(*at_step, strict=True)
            cells.append(spread([100 * match for match in matches], "{:.1f}") + " %")
            cells.append(spread(losses, "{:.4f}"))
        print(f"| {arm.name} | {' | '.join(cells)} |", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and from where to where."""
    low, high = (form.format(bound(values)) for bound in (min, max))
    return f"{form.format(statistics.mean(values))} [{low}, {high}]"
