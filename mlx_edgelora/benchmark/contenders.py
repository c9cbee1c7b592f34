"""The contenders of the benchmark and their runners, functions that train in a separate process.

A runner is a function `(job, pause)`. It trains as described by the job, from the initial matrices
in `job.start`, and calls `pause(loss, trained)` after every step, with the loss as a float and, if
available, the trained arrays by name. `pause` returns when the contender may continue. The harness
measures the time, so a runner does not report any. `--also module:function` adds another package.
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
from mlx_edgelora.model.tokenizer import NO_CODE

# More steps than any run has, so that nothing is saved before the end.
NEVER = 10**9
# A budget that every plan fits.
PLENTY = 2**50
# Default budgets of this package.
BUDGETS = ("none", "100%", "50%", "25%", "min")
_HERE = __name__


class StepCallback(Protocol):
    """The function that a runner calls after each step."""

    def __call__(
        self,
        loss: float,
        trained: Mapping[str, mx.array] | None = None,
        disk: tuple[int, int] | None = None,
    ) -> None:
        """Report a step.

        Args:
            loss: loss of the step.
            trained: trained arrays by name.
            disk: bytes read and written since the start of the run.
        """


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        name: name of the row.
        runner: `module:function`.
        environment: additional environment variables of its process.
        checkpointing: whether mlx-lm uses gradient checkpointing.
        share: memory budget as a share of the peak of mlx-lm with gradient checkpointing; None if
            the budget is not such a share.
        budget: memory budget that does not depend on this peak; None for no such budget.
    """

    name: str
    runner: str
    environment: Mapping[str, str] = field(default_factory=dict)
    checkpointing: bool = False
    share: float | None = None
    budget: int | str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the contender is this package with a budget."""
        return self.share is not None or self.budget is not None

    def budget_for(self, peak: int) -> int | str:
        """The budget, given the peak of mlx-lm with gradient checkpointing."""
        return self.budget if self.share is None else int(self.share * peak)


def contenders(
    budgets: Sequence[str] = BUDGETS, also: Sequence[str] = (), variants: bool = True
) -> list[Contender]:
    """All contenders. The first is the reference; budgets are shares of the second one's peak.

    Args:
        budgets: budgets of this package, one row for each; see `own`.
        also: runners of other packages.
        variants: whether to add mlx-lm with another order of evaluation and, if it is installed,
            unsloth.
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
    """This package with a budget: none, min, 4GB, or 25% of mlx-lm's peak with checkpointing.

    Raises:
        ValueError: the budget has another form.
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
    """Train with mlx-lm's own trainer, unmodified, as `mlx_lm.lora` does.

    Batches are those of `batches_of`.
    """
    model, tokenizer = load(job.model, tokenizer_config=dict(NO_CODE))
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
    """mlx-lm's `iterate_batches` with a seeded order and without labels on padding.

    mlx-lm's loss trains each row that is shorter than its batch to predict one token of padding.
    The position of the last label comes from `lengths`, so reducing the length by one makes both
    packages compute the same loss (docs/differences-from-mlx-lm.md).
    """

    def iterate(**arguments: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for tokens, lengths in trainer.iterate_batches(**arguments, seed=job.seed):
            yield tokens, lengths - mx.array([0, 1])

    return iterate


def mlx_edgelora(job: TrainingJob, pause: StepCallback) -> None:
    """Train with the public `finetune` of this package.

    No arrays are reported, because adapters may be in a file. The loss of the next step shows
    whether an update was made, and the saved adapters show whether the last one was.
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
        verify="off",  # mlx-lm does not verify gradients before its first step
        **job.options,
    )


def unsloth(job: TrainingJob, pause: StepCallback) -> None:
    """Train with unsloth's MLX trainer, with its own loss and gradient checkpointing.

    This runner follows the public source (unsloth_zoo/mlx/trainer.py and loader.py of 2026). It is
    untested, because the package needs Apple silicon. Batches have the form that unsloth prepares.
    Clipping, warm-up and decay of the learning rate are off, as for the other contenders.
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
    """Tokens, lengths, and labels, which are -100 for tokens that are not trained."""
    data = CacheDataset(_dataset(job, tokenizer))
    arguments = {"dataset": data, "batch_size": job.batch, "max_seq_length": job.limit}
    batches = batches_of(job)(**arguments, loop=True)
    for _, (tokens, lengths) in zip(range(job.last), batches, strict=False):
        places, bounds = np.arange(tokens.shape[1]), np.array(lengths)
        trains = (places >= bounds[:, :1]) & (places <= bounds[:, 1:])
        yield tokens, lengths, mx.array(np.where(trains, np.array(tokens), -100))


def _dataset(job: TrainingJob, tokenizer: object) -> object:
    """The rows of the job as a data set of mlx-lm."""

    class Options:
        mask_prompt = job.mask_prompt

    return load_local_dataset(Path(job.data), tokenizer, Options)[0]
