"""A complete run: model, adapters, data, engine and training loop; entry point for users."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.optimizers as optimizers

from mlx_edgelora.config import LoraParameters, TrainConfig
from mlx_edgelora.config.losses import check_processes, preference_loss
from mlx_edgelora.data import Dataset
from mlx_edgelora.data.batches import count_batches
from mlx_edgelora.engine.optimizer import build_optimizer
from mlx_edgelora.engine.preferences import PreferenceEngine
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.preferences import Figures
from mlx_edgelora.measure.meter import reset_peak
from mlx_edgelora.measure.text import say
from mlx_edgelora.model.checkpoint import LazyModel, error_text
from mlx_edgelora.model.hashes import weights_fingerprint
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner.machine import converts_dtype
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.training import summary
from mlx_edgelora.training.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_adapter,
    other_base,
)
from mlx_edgelora.training.awake import keep_awake
from mlx_edgelora.training.callbacks import TrainingCallback, reporting_callbacks
from mlx_edgelora.training.checkpoints import (
    Checkpoint,
    Origin,
    fingerprint,
    package_versions,
)
from mlx_edgelora.training.evaluate import GradientEngine, evaluate, rewards
from mlx_edgelora.training.group import Group
from mlx_edgelora.training.limits import BudgetWatch, PressureWatch
from mlx_edgelora.training.log import RunLog, recorded
from mlx_edgelora.training.loop import TrainResult, train
from mlx_edgelora.training.opening import (
    adapted_model,
    adapter_to_start,
    cache_folder,
    dtype_of,
    explained_failures,
    largest_piece,
    open_run,
    read_sets,
    renew,
    spill_place,
    with_embedded,
    with_layers,
)
from mlx_edgelora.training.profiling import memory_profile
from mlx_edgelora.training.rehearsal import AnotherEngineError, rehearse
from mlx_edgelora.training.resuming import (
    check_contents,
    check_iters,
    fingerprints,
    options_digest,
    planned,
    run_folder,
    with_saved,
)
from mlx_edgelora.training.samples import SamplePrompts, sample_callbacks, sample_prompts
from mlx_edgelora.training.training_loss import check_loss, training_loss
from mlx_edgelora.training.verdict import refuse_wrong
from mlx_edgelora.training.verification import verify

# math.exp overflows a little above this number.
MAX_EXPONENT = 700.0
BFLOAT16 = (
    "note: the GPUs of M1 and M2 have no bfloat16 and convert it; --dtype float16 is faster, but "
    "the run stops if a number exceeds 65504"
)


def finetune(
    config: TrainConfig,
    callbacks: Sequence[TrainingCallback] = (),
    notify: Callable[[str], None] = say,
    log: RunLog | None = None,
) -> TrainResult | None:
    """Fine-tune a model, test it, or both, according to `config`.

    Args:
        config: options of the run.
        callbacks: called with every report, as in `mlx_lm.tuner`.
        notify: called with every line to show: choices, warnings and test results.
        log: an open log from `recorded`, which gets the records of the run; by default this
            function opens the files that config.log and config.report name.

    Returns:
        Results of training; None without training.

    Raises:
        EdgeLoraError: the run cannot start or continue, for a reason that the user can change;
            no file is damaged.
    """
    group = Group.joined()
    if config.balance and group.size == 1:
        raise EdgeLoraError(
            "balance: got true in a run by one process, expected several that share the rows; "
            "start them with mlx.launch, or leave balance out"
        )
    config = with_embedded(group.own_options(config))
    check_processes(config, group.size)
    if not group.leads:
        callbacks, notify = (), _discard_line
    if not config.train:
        config = with_saved_layers(config)
    optimizer = build_optimizer(config)  # raises errors before anything slow begins
    callbacks = [*callbacks, *reporting_callbacks(config)]
    opened = recorded(config) if log is None else nullcontext(log)
    with (
        opened as records,
        explained_failures(config),
        keep_awake(config.caffeinate),
        run_folder(config, group.leads) as checkpoint,
    ):
        note = _discard_record if records is None else records.note
        run = _prepare(config, checkpoint, notify, note, group)
        again: RunPlan | None = None
        while True:
            try:
                return _run(run, optimizer, callbacks, notify, records, again)
            except AnotherEngineError as needed:
                again = needed.chosen
            renew(run.lazy, run.planned)


def _run(
    run: "_PreparedRun",
    optimizer: optimizers.Optimizer,
    callbacks: Sequence[TrainingCallback],
    notify: Callable[[str], None],
    records: RunLog | None,
    again: RunPlan | None,
) -> TrainResult | None:
    """Train and test with one engine; its plan is `again`, if it is given."""
    config, result = run.config, None
    note = _discard_record if records is None else records.note
    opening = run.planned, run.lazy, run.sets, spill_place(config), notify, run.start, again
    with open_run(*opening) as (engine, chosen):
        check_loss(config, engine.head)
        compares = config.compares_answers
        measured = PreferenceEngine(engine, preference_loss(config)) if compares else engine
        note("plan", summary.plan_record(chosen))
        if config.train:
            if again is None:
                _advise_packing(run, engine, chosen, notify)
            if config.verify == "on" and again is None:
                notify(_verification_line(engine, chosen, config))
            opened = engine, measured
            result = _train(run, opened, chosen, optimizer, callbacks, notify, records)
        if config.test:
            loss, tokens = evaluate(
                measured, run.test_set, config, config.test_batches, group=run.group
            )
            figures = rewards(measured, run.group)
            notify(_test_result(loss, tokens, figures))
            known = {} if figures is None else figures.record()
            note("test", {"loss": loss, "tokens": tokens, **known})
    return result


@dataclass(frozen=True)
class _PreparedRun:
    """Everything about a run that is known before its weights are read.

    Attributes:
        config: options of the run, with the numbers of layers and steps filled in.
        planned: the same options, with the memory plan of the checkpoint if the run is resumed.
        lazy: the adapted model.
        train_set: training rows; None if they are not needed.
        valid_set: validation rows; None if they are not needed.
        test_set: test rows; None if they are not needed.
        checkpoint: the checkpoint to resume from; None for a new run.
        fingerprints: SHA-256 of the model and of the tokenized data.
        start: file of the adapter to load before the first step; None for a new adapter.
        samples: prompts of `sample_every`; None without.
        group: the processes of the run.
    """

    config: TrainConfig
    planned: TrainConfig
    lazy: LazyModel
    train_set: Dataset | None
    valid_set: Dataset | None
    test_set: Dataset | None
    checkpoint: Checkpoint | None
    fingerprints: dict[str, str]
    start: Path | None
    samples: SamplePrompts | None
    group: Group

    @property
    def sets(self) -> list[Dataset]:
        """The data sets that are not None."""
        every = self.train_set, self.valid_set, self.test_set
        return [dataset for dataset in every if dataset is not None]


def _prepare(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    notify: Callable[[str], None],
    note: Callable[[str, Any], None],
    group: Group,
) -> _PreparedRun:
    """Open the model and the data, and report what they are."""
    if checkpoint is not None:
        config = with_saved(config, checkpoint)
    lazy = adapted_model(config)
    config = with_layers(config, lazy, notify)
    if converts_dtype(dtype_of(config) or lazy.blocks.hidden_dtype):
        notify(BFLOAT16)
    about: list[str] = []
    tokenizer = load_tokenizer_of(lazy)
    sets = read_sets(config, tokenizer, lazy.vocabulary, notify, about.append)
    config = _with_iters(config, sets[0])
    samples = sample_prompts(config, tokenizer) if group.leads else None
    facts = summary.facts(config, lazy, sets, about)
    notify(summary.lines(facts))
    note("run", summary.run_record(config, facts))
    found = fingerprints(lazy.checkpoint, sets[0]) if config.train else {}
    versions = json.dumps(package_versions(), sort_keys=True).encode()
    of_all = {
        "options": options_digest(config),
        "set of package versions": fingerprint(iter([versions])),
    }
    group.check_same(found | of_all)
    if group.size > 1:
        notify(summary.line("processes", f"{group.size}, which share the rows of every batch"))
    wanted = config
    if checkpoint is None:
        start = adapter_to_start(config)
    else:
        check_iters(config, checkpoint)
        check_contents(found, config, checkpoint)
        start, wanted = checkpoint.weights, planned(config, checkpoint)
    if start is not None:
        _say_start(start, checkpoint, config, notify)
    # A process plans for the rows that it gets.
    wanted = dataclasses.replace(wanted, batch_size=group.rows(wanted.batch_size))
    return _PreparedRun(config, wanted, lazy, *sets, checkpoint, found, start, samples, group)


def _train(
    run: _PreparedRun,
    opened: tuple[Engine, GradientEngine],
    chosen: RunPlan,
    optimizer: optimizers.Optimizer,
    callbacks: Sequence[TrainingCallback],
    notify: Callable[[str], None],
    records: RunLog | None,
) -> TrainResult:
    """Rehearse the largest batch, then train; see `rehearse`.

    `opened` is the engine of the model, and the engine of the loss, which may be the same.
    """
    engine, measured = opened
    config, note = run.config, _discard_record if records is None else records.note
    folder, tiles = cache_folder(config), chosen.plan.loss_bytes
    losses = training_loss(config, engine.head, run.train_set, folder, notify, tiles)
    with losses as loss, memory_profile(config, notify, records) as first:
        engine.training_loss = loss
        before = chosen.plan
        rehearse(engine, chosen, notify)
        if chosen.plan != before:
            note("plan", summary.plan_record(chosen))
        reset_peak()
        samples = sample_callbacks(run.samples, engine, chosen, note)
        watches = BudgetWatch(engine, chosen, notify, note), PressureWatch(notify)
        # A function and not a value, because `BudgetWatch` may change the plan.
        plan = lambda: chosen.plan.json()  # noqa: E731, PLW0108
        return train(
            measured,
            optimizer,
            config,
            run.train_set,
            run.valid_set,
            [*first, *samples, *callbacks, *watches],
            log=records,
            origin=Origin(
                run.checkpoint,
                run.fingerprints,
                plan,
                config.overwrite,
                run.group,
                weights_fingerprint(run.lazy.source),
            ),
        )


def _discard_line(line: str) -> None:
    """Do nothing; used in processes other than the first."""


def _discard_record(kind: str, facts: Any) -> None:
    """Do nothing; used in runs without a log."""


def _verification_line(engine: Engine, chosen: RunPlan, config: TrainConfig) -> str:
    """Verify the gradients in the light form and describe the result in one line.

    Raises:
        EdgeLoraError: a gradient differs from plain MLX.
    """
    start = time.perf_counter()
    verdicts = verify(engine, *largest_piece(chosen), dtype_of(config), light=True)
    refuse_wrong(verdicts)
    error, spent = max(verdict.error for verdict in verdicts), time.perf_counter() - start
    message = f"{len(verdicts)} comparisons with plain MLX (error {error:.0e}, {spent:.1f} s)"
    return summary.line("gradients", f"equal in {message}")


def with_saved_layers(config: TrainConfig) -> TrainConfig:
    """For a test without training, take layers and LoRA parameters from the saved adapter.

    Raises:
        EdgeLoraError: `adapter_path` has no valid configuration, or `resume_adapter_file` is set.
    """
    if config.resume_adapter_file is not None:
        raise EdgeLoraError(
            f"resume_adapter_file: got {config.resume_adapter_file!r} without training, but a test "
            "evaluates the adapter in adapter_path; leave it out, or train"
        )
    if not config.adapter_path:  # the base model, as in mlx-lm
        return config
    path = Path(config.adapter_path) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
        layers = {key: saved[key] for key in ("num_layers", "lora_parameters")}
        layers["fine_tune_type"] = saved.get("fine_tune_type", "lora")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(
            f"{path}: not the configuration of an adapter ({error_text(error)}); name the folder "
            "of a trained adapter, or test the base model with --adapter-path ''"
        ) from error
    # Unknown keys in the file of another program, such as alpha, are ignored; a saved scale is the
    # one to apply.
    own = {field.name for field in dataclasses.fields(LoraParameters)} - {"use_rslora"}
    if isinstance(layers["lora_parameters"], Mapping):
        layers["lora_parameters"] = {
            key: value for key, value in layers["lora_parameters"].items() if key in own
        }
    like = TrainConfig.from_dict(layers, str(path))
    return dataclasses.replace(
        config,
        fine_tune_type=like.fine_tune_type,
        num_layers=like.num_layers,
        lora_parameters=like.lora_parameters,
        resume_adapter_file=str(Path(config.adapter_path) / WEIGHTS_FILE),
    )


def _with_iters(config: TrainConfig, train_set: Dataset | None) -> TrainConfig:
    """Replace `epochs` by the equivalent number of steps, `iters`."""
    if config.epochs is None or train_set is None:
        return config
    iters = count_batches(
        train_set,
        config.batch_size,
        config.max_seq_length,
        epochs=config.epochs,
        seed=config.seed,
        packing=config.packing,
    )
    return dataclasses.replace(config, iters=iters, epochs=None)


def _advise_packing(
    run: _PreparedRun, engine: Engine, chosen: RunPlan, notify: Callable[[str], None]
) -> None:
    """Recommend packing if it saves much and the model supports it."""
    if (advice := summary.packing_advice(run.config, run.train_set)) is None:
        return
    with suppress(EdgeLoraError):
        engine.walk.check_packing(chosen.batch_shape.tokens)
        notify(summary.line("packing", advice))


def _say_start(
    start: Path, checkpoint: Checkpoint | None, config: TrainConfig, log: Callable[[str], None]
) -> None:
    """Check the adapter that a new run starts from, and report it."""
    if checkpoint is not None:  # its manifest was checked, and the loop reports it
        return
    for note in (check_adapter(start), other_base(start, config.model)):
        if note is not None:
            log(f"note: {note}")
    if config.train:
        log(
            f"weights loaded from {start}; steps, optimizer and schedule start anew (--resume "
            "continues a run)"
        )


def perplexity(loss: float) -> float:
    """The exponential of a mean loss; infinite where that is no float."""
    return math.exp(loss) if loss < MAX_EXPONENT else math.inf


def _test_result(loss: float, tokens: int, figures: Figures | None) -> str:
    if not math.isfinite(loss):
        raise EdgeLoraError(
            f"test loss is {loss} on {tokens} tokens, expected a finite number; test another "
            "adapter, or the base model with --adapter-path ''"
        )
    if figures is not None:
        margin = "" if figures.margin is None else f", reward margin {figures.margin:.3f}"
        return f"test loss {loss:.3f}{margin}, accuracy {figures.accuracy:.1%} on {tokens} tokens"
    return f"test loss {loss:.3f}, perplexity {perplexity(loss):.3f} on {tokens} tokens"
