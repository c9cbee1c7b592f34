"""Who is compared, and how each makes steps: functions that are called in processes of their own.

A runner is a function `(job, pause)`. It trains as the job says, from the initial matrices in
`job.start`, and calls `pause(loss, trained)` after every step: with the step's loss as a float
and, where it has them at hand, the trained arrays by name. The pause ends when it is
its turn again; the harness takes the time in between, so that a runner reports none.
Another package joins in with `--also module:function`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from mlx_edgelora import LoraParameters, TrainConfig, TrainingCallback, finetune
from mlx_edgelora.benchmark.job import TrainingJob
from mlx_edgelora.config.kinds import BUDGET
from mlx_edgelora.measure.units import size

# No run is as long: nothing is saved before its end.
NEVER = 10**9
# A budget that every plan fits into.
PLENTY = 2**50
# Of this package, where the user names none.
BUDGETS = ("none", "100%", "50%", "25%", "min")
_HERE = __name__


class StepCallback(Protocol):
    """What a runner calls after each step."""

    def __call__(
        self,
        loss: float,
        trained: Mapping[str, mx.array] | None = None,
        disk: tuple[int, int] | None = None,
    ) -> None:
        """Tell the loss, the trained arrays, and bytes read and written since the run began."""


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        name: of the row.
        runner: `module:function`.
        environment: what its process gets besides.
        checkpointing: of mlx-lm.
        share: of the peak of mlx-lm with gradient checkpointing that is its memory budget; None
            without one.
        budget: one that does not depend on that peak.
    """

    name: str
    runner: str
    environment: Mapping[str, str] = field(default_factory=dict)
    checkpointing: bool = False
    share: float | None = None
    budget: int | str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this package, with a budget."""
        return self.share is not None or self.budget is not None

    def budget_for(self, peak: int) -> int | str:
        """The budget, given the peak of mlx-lm with gradient checkpointing."""
        return self.budget if self.share is None else int(self.share * peak)


def contenders(
    budgets: Sequence[str] = BUDGETS, also: Sequence[str] = (), variants: bool = True
) -> list[Contender]:
    """All of them; the first is the reference, the second gives budgets.

    Args:
        budgets: of this package, a row for each: as `own` takes them.
        also: runners of others.
        variants: whether mlx-lm's other order of evaluation, and unsloth where it is installed,
            are among them.
    """
    mlx_lm = f"{_HERE}:mlx_lm"
    rivals = [
        Contender("mlx-lm", mlx_lm),
        Contender("mlx-lm, checkpointing", mlx_lm, checkpointing=True),
    ]
    if variants:
        narrow = {"MLX_BFS_MAX_WIDTH": "1"}
        name = "mlx-lm, checkpointing, narrow"
        rivals.append(Contender(name, mlx_lm, environment=narrow, checkpointing=True))
        if find_spec("unsloth_zoo") is not None:
            rivals.append(Contender("unsloth", f"{_HERE}:unsloth"))
    rivals += [Contender(runner, runner) for runner in also]
    return rivals + [own(budget) for budget in budgets]


def own(budget: str) -> Contender:
    """This package within none, min, 4GB, or 25% of the peak of mlx-lm with checkpointing.

    Raises:
        ValueError: it is none of these.
    """
    runner, text = f"{_HERE}:mlx_edgelora", budget.strip().lower()
    if text == "none":
        return Contender("mlx-edgelora, no limit", runner, budget=PLENTY)
    if text.endswith("%"):
        share = float(text[:-1])
        if not 0 < share <= 1000:
            raise ValueError
        return Contender(f"mlx-edgelora, {share:g} %", runner, share=share / 100)
    count = BUDGET.read(text)
    name = count if count == "min" else size(count)
    return Contender(f"mlx-edgelora, {name}", runner, budget=count)


def mlx_lm(job: TrainingJob, pause: StepCallback) -> None:
    """mlx-lm's own trainer, unmodified, as `mlx_lm.lora` calls it.

    Its batches go through `batches_of`.
    """
    model, tokenizer = load(job.model)
    model.freeze()
    settings = {"rank": job.rank, "scale": job.scale, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), settings)
    model.load_weights(job.start, strict=False)
    data = CacheDataset(_dataset(job, tokenizer))

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            pause(train_info["train_loss"], dict(tree_flatten(model.trainable_parameters())))

    args = trainer.TrainingArgs(
        batch_size=job.batch,
        iters=job.last,
        steps_per_report=1,
        steps_per_save=NEVER,
        max_seq_length=job.limit,
        adapter_file=str(Path(job.output, "theirs.safetensors")),
        grad_checkpoint=job.checkpointing,
    )
    trainer.train(
        model,
        optimizers.AdamW(job.learning_rate),
        data,
        args=args,
        iterate_batches=batches_of(job),
        training_callback=Callback(),
    )


def batches_of(job: TrainingJob) -> Callable[..., Iterator[tuple[mx.array, mx.array]]]:
    """mlx-lm's `iterate_batches`, its order seeded, and no label on padding.

    Its own loss trains each row that is shorter than its batch to predict one token of padding;
    it takes the place of the last label from `lengths`, so that a row's length less one makes
    both packages compute the same loss (docs/differences-from-mlx-lm.md).
    """

    def iterate(**arguments: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for tokens, lengths in trainer.iterate_batches(**arguments, seed=job.seed):
            yield tokens, lengths - mx.array([0, 1])

    return iterate


def mlx_edgelora(job: TrainingJob, pause: StepCallback) -> None:
    """This package, through its public `finetune`.

    It has no arrays to show, for what it trains may wait in a file: the loss of the next step
    tells whether the update before it was made, and the saved adapters whether the last one was.
    """

    class Callback(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            disk = train_info["disk_read_bytes"], train_info["disk_write_bytes"]
            pause(train_info["train_loss"], disk=disk)

    finetune(config_of(job), [Callback()])


def config_of(job: TrainingJob) -> TrainConfig:
    """The options of this package's run."""
    return TrainConfig(
        model=job.model,
        data=job.data,
        mask_prompt=job.mask_prompt,
        max_seq_length=job.limit,
        seed=job.seed,
        num_layers=-1,
        lora_parameters=LoraParameters(rank=job.rank, scale=job.scale),
        resume_adapter_file=job.start,
        adapter_path=job.output,
        batch_size=job.batch,
        iters=job.last,
        optimizer="adamw",
        learning_rate=job.learning_rate,
        val_batches=0,
        steps_per_report=1,
        save_every=NEVER,
        plan_out=str(job.plan_file),
        verify="off",  # mlx-lm has no such thing before its first step
        **job.options,
    )


def unsloth(job: TrainingJob, pause: StepCallback) -> None:
    """unsloth's MLX trainer with its own loss and gradient checkpointing.

    Written from its public source (unsloth_zoo/mlx/trainer.py and loader.py of 2026) and never
    run here: the package needs Apple silicon. Its batches are given in the form it prepares
    them in itself, without its clipping, warm-up and decay, which the others have not either.
    """
    from unsloth_zoo.mlx.loader import FastMLXModel  # noqa: PLC0415 - an optional package
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig  # noqa: PLC0415

    model, tokenizer = FastMLXModel.from_pretrained(
        job.model, max_seq_length=job.limit, load_in_4bit=False, text_only=True
    )
    model = FastMLXModel.get_peft_model(
        model, r=job.rank, lora_alpha=job.scale * job.rank, lora_dropout=0
    )
    model.load_weights(job.start, strict=False)
    arguments = MLXTrainingConfig(
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=1,
        max_steps=job.last,
        warmup_steps=0,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_leaf_norm=0.0,
        logging_steps=1,
        max_seq_length=job.limit,
        output_dir=job.output,
    )
    training = MLXTrainer(model, tokenizer, [], args=arguments)
    training._batches = list(_labelled_batches(job, tokenizer))

    def stepped(step: int, total: int, loss: float, *_rest: Any) -> None:
        pause(float(loss), dict(tree_flatten(model.trainable_parameters())))

    training.add_step_callback(stepped)
    training.train()


def _labelled_batches(job: TrainingJob, tokenizer: object) -> Iterator[tuple[mx.array, ...]]:
    """Tokens, lengths, and labels that are -100 where nothing is trained."""
    data = CacheDataset(_dataset(job, tokenizer))
    arguments = {"dataset": data, "batch_size": job.batch, "max_seq_length": job.limit}
    batches = batches_of(job)(**arguments, loop=True)
    for _, (tokens, lengths) in zip(range(job.last), batches, strict=False):
        places, bounds = np.arange(tokens.shape[1]), np.array(lengths)
        trains = (places >= bounds[:, :1]) & (places <= bounds[:, 1:])
        yield tokens, lengths, mx.array(np.where(trains, np.array(tokens), -100))


def _dataset(job: TrainingJob, tokenizer: object) -> object:
    """mlx-lm's own data set of the job's rows."""

    class Options:
        mask_prompt = job.mask_prompt

    return load_local_dataset(Path(job.data), tokenizer, Options)[0]
